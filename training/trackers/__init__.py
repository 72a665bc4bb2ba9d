"""This package records runs in tools that compare experiments: TensorBoard and MLflow.

    events of a run --tracking.Tracking--> Tracker: RUN/tensorboard, or an MLflow server

`tracker` defines the interface. `tensorboard` and `mlflow` implement it. `tracking` opens the trackers of a run.
`mlflow_model` is a part of the models on an MLflow server and is not imported here.
"""
