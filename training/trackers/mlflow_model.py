"""The code of the models that `MlflowTracker` logs. `mlflow.pyfunc.load_model` runs this file where it loads a model.

It needs PyTorch and MLflow only. Input: uint8 [N, 3, 32, 32]. Output: float32 logits [N, classes].
"""

import warnings
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from numpy.typing import NDArray


class Classifier(PythonModel):
    """An exported classifier on the CPU."""

    def load_context(self, context: Any) -> None:
        """Load `model.pt`, which MLflow keeps unchanged."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", FutureWarning)
            self._module = torch.jit.load(context.artifacts["model"], map_location="cpu")

    # MLflow knows no other type of an array. It compares the input with the signature before this call.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> NDArray[np.float32]:  # noqa: ARG002
        """Compute logits."""
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._module(torch.from_numpy(model_input)).numpy()
        return logits


set_model(Classifier())
