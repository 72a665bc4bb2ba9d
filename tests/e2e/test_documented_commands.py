"""Run the commands of README.md and docs/ as a reader would, and compare their output with that in the documents.

The server has a copy of the shipped models. Commands that take minutes are not run; only their arguments are checked.
"""

import os
import re
import shlex
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from documented_commands import Command, PythonSession, differs, list_commands, run_shell
from PIL import Image
from server import Server, wait_for
from service import list_processes

from training.__main__ import cli as training_cli
from training.recipes import make_recipe
from training.store import LocalStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "docs/client.md", "docs/training.md", "docs/api.md", "docs/cli.md", "docs/operations.md"]
ADDRESS = "127.0.0.1:8000"
JOB = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
EVALUATION = "0123456789ab"

# Commands that are not run here, with the reason.
NOT_RUN = {
    "make ": "it installs; CI runs it in a fresh clone",
    ". .venv": "the tests run in this environment already",
    "pip install ": "it installs",
    "curl -C - -O": "the file is complete; tests/app/routes/test_versions.py reads ranges",
    "curl -F file=@resnet-4.zip": "uploads are off without keys; tests/app/routes/test_versions.py uploads",
    "curl -F file=@cascade.zip": "see above",
    "tensorboard ": "it serves until it is stopped; tests/training/test_tensorboard.py reads the events",
    "mlflow ": "it serves until it is stopped; tests/training/test_mlflow.py has a server",
    "import mlflow": "tests/training/test_mlflow.py loads a model from a server",
    "curl -O 127.0.0.1:8000/train/": "the file exists when the job has finished",
    "curl -X POST '127.0.0.1:8000/evaluate?split": "the synthetic data set has other classes",
}
NOT_RUN |= {
    "cifar100 serve": "it serves until it is stopped; tests/app/cli/test_serve.py starts it",
    "cifar100 doctor": "it describes the machine; tests/app/cli/test_local.py reads it",
    "cifar100 explain docs/pictures/rocket.jpg --picture": "the map depends on the runtime",
    "cifar100 evaluate resnet": "the synthetic data set has other classes",
    "cifar100 train resnet width=8 epochs=2 int8=false --data synthetic": "it takes a minute; docs/training.md is run",
    "cifar100 jobs ": "a job takes a minute; tests/app/cli/test_server.py submits and follows one",
    "cifar100 data check": "it needs the real data set",
}
NOT_RUN |= {  # docs/operations.md
    "curl -o resnet-4.zip https://": "it names two other machines; tests/app/routes/test_versions.py moves a version",
    "curl -F file=@resnet-4.zip 'https://": "see above",
    "cifar100 data export-feedback": "there are no corrections; tests/app/routes/test_feedback.py exports some",
    "cifar100 data pack": "see above",
    "CIFAR100_UDS=": "it serves until it is stopped; tests/e2e/test_startup.py starts it",
    "curl --unix-socket": "see above",
    "prometheus ": "it runs until it is stopped; tests/test_deploy.py checks its files",
    "OTEL_": "it serves until it is stopped; tests/app/observability/test_tracing.py reads the spans",
    "export RAY_AUTH_MODE": "it needs a cluster; tests/app/distributed starts one",
    "ray start": "see above",
    "export CIFAR100_DATABASE": "it needs a server; tests/e2e/test_shared_jobs.py starts one",
    "CIFAR100_MODELS=/srv/models": "see above",
    "aws s3 cp": "it needs an object store; tests/e2e/test_shared_models.py copies a store",
    "CIFAR100_MODELS=s3://": "it needs an object store; tests/e2e/test_shared_models.py serves from one",
    "CIFAR100_JOBS=ray": "it needs a cluster; tests/app/distributed/test_ray_jobs.py starts one",
    "CIFAR100_CLUSTER=": "see above",
    "OMP_NUM_THREADS=4 torchrun": "it takes minutes; tests/training/test_process_group.py runs torchrun",
    "docker ": "it needs a container engine; tests/stress/container.py builds and runs the image",
    "useradd ": "these commands change the machine; tests/test_deploy.py checks the unit",
    "git clone . /opt": "see above",
    "install ": "see above",
    "cp deploy": "see above",
    "systemctl ": "see above",
}
FORMS = "runs/store/"  # the folder of a version with further forms, which tests/training/test_torch_export.py loads
FEEDBACK = f"{ADDRESS}/feedback"  # it is off by default; tests/app/routes/test_feedback.py sends corrections
TRAINING = ("python -m training ", "cifar100 train ")  # commands that take minutes: their arguments are checked
LONG_TRAINING, SHORT_TRAINING = 'train("resnet", epochs=3)', 'train("resnet", epochs=1, width=8)'

# Errors of curl and statuses of errors fail a command of a block without output.
STRICT = 'curl() { command curl --silent --show-error --fail-with-body --max-time 30 "$@"; }'
LENIENT = 'curl() { command curl --silent --show-error --max-time 30 "$@"; }'


class Reader:
    """A reader of a document: a folder, a running service, and an interpreter.

    Args:
        server: The service.
        folder: Folder in which the reader works.
    """

    def __init__(self, server: Server, folder: Path):
        self._address = (server.address or "").removeprefix("http://")
        self._folder = folder
        self._python = PythonSession()
        self._jobs = dict[str, str]()  # by their ids in the document

    def follow(self, command: Command) -> None:
        """Run a command and compare its output with that of the document."""
        text = self._replace(command.text)
        output = ""
        if command.language in ("python", "pycon"):
            output = self._python.run(command, text)
        elif text.startswith(TRAINING) and command.output is None:
            check_training_arguments(text)
        else:
            preamble = STRICT if command.output is None else LENIENT
            status, output = run_shell(text, self._folder, os.environ | {"KEY": "unused"}, preamble)
            if command.output is None:
                assert status == 0, f"the exit status is {status}: {output}"
        if command.output and (shown := JOB.search(command.output)) and (made := JOB.search(output)):
            self._jobs[shown[0]] = made[0]
        if command.output is not None and (difference := differs(command.output, output)):
            raise AssertionError(difference)

    def close(self) -> None:
        """Close the clients of the interpreter."""
        self._python.close()

    def _replace(self, text: str) -> str:
        """Put the address of the server, and the newest job and evaluation, in the place of those of the document."""
        if job := JOB.search(text):
            text = JOB.sub(self._jobs.get(job[0]) or self._newest("train"), text)
        if EVALUATION in text:
            text = text.replace(EVALUATION, self._newest("evaluate/jobs"))
        return text.replace(ADDRESS, self._address).removeprefix(".venv/bin/").replace(LONG_TRAINING, SHORT_TRAINING)

    def _newest(self, path: str) -> str:
        newest = httpx.get(f"http://{self._address}/{path}").json()
        if not newest:
            newest = [httpx.post(f"http://{self._address}/{path}", json={"recipe": "resnet"}).json()]
        return str(newest[0]["id"])


def check_training_arguments(text: str) -> None:
    """Parse the arguments of `python -m training` as it does.

    Raises:
        Exception: An argument or a field of a recipe is wrong.
    """
    group = typer.main.get_command(training_cli)
    arguments = shlex.split(text.removeprefix("python -m training ").removeprefix("cifar100 "))
    with group.make_context("training", arguments) as context:
        name, command, rest = group.resolve_command(context, arguments)  # type: ignore[attr-defined]
        values = command.make_context(name, rest, parent=context).params
    if name == "train":
        make_recipe(values["name"], dict(each.split("=") for each in values["overrides"] or []))


def list_live(server: Server) -> dict[str, int]:
    """Return the versions that the service answers with, by model."""
    models = httpx.get(f"{server.address}/health").json()["models"]
    return {name: model["version"] for name, model in models.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with the files that the documents name."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "docs/pictures").mkdir(parents=True)
    shutil.copy(ROOT / "docs/pictures/rocket.jpg", folder / "docs/pictures")
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "models", folder / "models")
    photo = Image.open(ROOT / "docs/pictures/rocket.jpg")
    photo.save(folder / "image.bmp")
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.write(folder / "docs/pictures/rocket.jpg", "rocket/1.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield folder
    for process in list_processes(folder):
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(folder / "models", folder / "runs", folder / "log", runtime="auto") as server:
        yield server


@pytest.fixture
def reader(server: Server, folder: Path) -> Iterator[Reader]:
    """A reader with the shipped models, whatever the commands of another document have changed."""
    shipped, store = LocalStore(ROOT / "models"), LocalStore(folder / "models")
    shutil.copytree(shipped.root, store.root, dirs_exist_ok=True)
    for name in store.names():
        for version in set(store.versions(name)) - set(shipped.versions(name)):
            shutil.rmtree(store.folder(name, version))
    wait_for(lambda: list_live(server) == {name: shipped.live(name) for name in shipped.names()}, 60)
    reader = Reader(server, folder)
    yield reader
    reader.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_do_what_it_shows(document: str, reader: Reader) -> None:
    failures = []
    for command in list_commands(ROOT / document):
        if command.text.startswith(tuple(NOT_RUN)) or FORMS in command.text or FEEDBACK in command.text:
            continue
        try:
            reader.follow(command)
        except Exception as error:
            failures.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not failures, "\n" + "\n".join(failures)
