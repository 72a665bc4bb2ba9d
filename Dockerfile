# CPU by default:  docker build -t cifar100 .
# NVIDIA GPU:      docker build -t cifar100 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 . and run it
#                  with --gpus all
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# The dependencies change rarely, so they are a layer of their own; torch comes from the index chosen above.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt \
 && grep -E '^torch' requirements.txt | xargs pip install --constraint constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
 && pip install --constraint constraints.txt -r requirements.txt
COPY app app
COPY training training
RUN pip install --no-deps .

FROM python:3.12-slim
COPY --from=build /venv /venv
RUN useradd --create-home --uid 1000 cifar100 && install -d -o cifar100 /data /srv/cifar100/runs
WORKDIR /srv/cifar100
COPY --chown=cifar100 models models
USER cifar100
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 CIFAR100_HOST=0.0.0.0 CIFAR100_PORT=8000 CIFAR100_DATA=/data \
    CIFAR100_FEATURES=/data/features
EXPOSE 8000
VOLUME ["/data", "/srv/cifar100/models", "/srv/cifar100/runs"]
HEALTHCHECK --start-period=30s --interval=10s --timeout=3s \
    CMD ["python", "-c", "import os, socket, sys, http.client as h; e = os.environ; u = e.get('CIFAR100_UDS'); c = h.HTTPConnection('127.0.0.1', int(e['CIFAR100_PORT']), timeout=2); c.sock = socket.socket(socket.AF_UNIX) if u else None; u and c.sock.connect(u); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "app"]
