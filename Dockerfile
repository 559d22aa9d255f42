# One image for a single machine, a Ray head and a Ray node.
#
#   docker build -t raylora .                                  the torch build that pip finds: CUDA on Linux
#   docker build -t raylora --build-arg TORCH_INDEX_URL=... .  another one, such as a CPU or an older CUDA build
#   docker run --shm-size 2g --stop-timeout 120 -p 127.0.0.1:8000:8000 -p 127.0.0.1:9000:9000 \
#     -e RAYLORA_S3_PUBLIC_ENDPOINT_URL=http://127.0.0.1:9000 -v raylora:/data raylora
#
# 8000 is HTTP, 9000 the embedded S3 server, which the URLs of pictures and uploads lead to: the variable says where
# clients reach it. With RAYLORA_S3_ENDPOINT_URL and its keys there is no embedded server, and neither is needed.
# Stopping takes longer than Docker's ten seconds: generations that run may end first. --stop-timeout is
# RAYLORA_DRAIN_S and 90 s more.
# The ports inside the container listen on every address; publish them on loopback or behind a TLS proxy.
# A pod that is to be a node of cluster.yaml runs `/opt/venv/bin/python -m cluster.node` as root instead.
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX_URL=""
WORKDIR /opt/raylora
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt pyproject.toml README.md LICENSE ./
# torch comes first and alone, so that a change of our own code does not download it again.
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY assets assets
COPY examples examples
COPY storage storage
COPY diffusion diffusion
COPY train_jobs train_jobs
COPY serve_app serve_app
COPY cluster cluster
RUN pip install -c constraints.txt -e .

FROM python:3.11-slim-bookworm
# openssh-server and rsync: the Ray cluster launcher reaches a node through them. The host keys that the package makes
# would be the same in every container; cluster/node.py makes them anew.
RUN apt-get update \
    && apt-get install --no-install-recommends -y openssh-server rsync \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && useradd --create-home --uid 10001 raylora \
    && install -d -o raylora -g raylora -m 0700 /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/raylora /opt/raylora
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAYLORA_HOME=/data \
    RAYLORA_HOST=0.0.0.0 \
    RAYLORA_S3_HOST=0.0.0.0 \
    RAYLORA_S3_PORT=9000 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.ingress.middleware:proxy_middlewares \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER raylora
WORKDIR /data
VOLUME /data
EXPOSE 8000 9000
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["raylora", "up"]
