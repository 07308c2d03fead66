# An image that serves. docs/operations.md says how it is run. Two targets:
#   docker build -t dqe-serve .                       the processor
#   docker build -t dqe-serve:gpu --target gpu .      NVIDIA GPUs; run with --gpus all. The larger by gigabytes
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON} AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/dqe/bin:$PATH
RUN python -m venv /opt/dqe \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin dqe \
    && install -d -o dqe -g dqe /data
# /data holds bundle, index, index.uploads and keys. Everything else may be read-only, but for /tmp.
WORKDIR /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# The port of the default command; /healthz needs neither a key nor a Host that is known.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["dqe-serve"]
CMD ["/data/bundle", "/data/index", "--host", "0.0.0.0"]

FROM base AS gpu
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[gpu,serve]" "onnxruntime-gpu[cuda,cudnn]" \
    && python -m compileall -q /opt/dqe/lib
USER 10001:10001

FROM base AS cpu
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[cpu,serve]" \
    && python -m compileall -q /opt/dqe/lib
USER 10001:10001
