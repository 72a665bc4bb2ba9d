# CPU by default:  docker build -t cifar100 .
# NVIDIA GPU:      docker build -t cifar100 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 . and run it
#                  with --gpus all
# Optional extras: docker build -t cifar100 --build-arg EXTRAS=heif .
FROM python:3.13-slim-trixie AS dependencies
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# A package without modules stands for the project here, so that this layer changes only with the dependencies.
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md LICENSE \
 && pip install --constraint constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch torchvision \
 && pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}" \
 && pip uninstall --yes cifar100 pip

FROM python:3.13-slim-trixie AS project
RUN python -m venv /venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY training training
RUN /venv/bin/pip install --no-cache-dir --no-deps --target /opt/cifar100 .

FROM python:3.13-slim-trixie
RUN useradd --uid 1000 --home-dir /data --no-create-home cifar100 \
 && install --directory --owner=1000 --group=1000 /data /srv/cifar100 /srv/cifar100/runs
WORKDIR /srv/cifar100
COPY --from=dependencies /venv /venv
COPY --chown=1000:1000 models models
COPY --from=project /opt/cifar100 /opt/cifar100
USER 1000:1000
# HOME is a volume, because PyTorch and Matplotlib keep their caches below it. The rest of the system may be read-only.
ENV PATH=/venv/bin:/opt/cifar100/bin:$PATH PYTHONPATH=/opt/cifar100 PYTHONUNBUFFERED=1 HOME=/data \
    CIFAR100_HOST=0.0.0.0 CIFAR100_PORT=8000 CIFAR100_DATA=/data CIFAR100_FEATURES=/data/features
EXPOSE 8000
VOLUME ["/data", "/srv/cifar100/models", "/srv/cifar100/runs"]
HEALTHCHECK --start-period=60s --interval=10s --timeout=3s CMD ["python", "-m", "app.server.probe"]
CMD ["python", "-m", "app"]
ARG REVISION=
LABEL org.opencontainers.image.title="cifar100" \
      org.opencontainers.image.description="Train, export, serve, measure and retrain CIFAR-100 residual networks." \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0"
