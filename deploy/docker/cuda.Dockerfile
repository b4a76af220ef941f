# moescope on NVIDIA GPUs (the driver of CUDA 13). From the repository's root:
#   docker build -f deploy/docker/cuda.Dockerfile -t moescope:cuda .
# CUDA comes with torch's own wheels: no CUDA base image, no toolkit.
FROM python:3.11.14-slim-bookworm AS build
ENV PATH=/opt/moescope/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/moescope
COPY deploy/docker/cuda.lock ./
RUN pip install --no-deps -r cuda.lock
COPY pyproject.toml README.md LICENSE ./
COPY tracer tracer
COPY analysis analysis
COPY server server
COPY clients clients
COPY deploy/*.py deploy/py.typed deploy/
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11.14-slim-bookworm
# Triton compiles its launchers with a C compiler. Not pinned: Debian's mirrors drop a package as
# soon as it has a security update, and the release is pinned by the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --create-home moescope \
    && install --directory --owner 10001 --group 10001 /data /data/traces /data/masks /data/hub
COPY --from=build /opt/moescope /opt/moescope
COPY --chmod=755 deploy/docker/init.py /usr/local/bin/moescope-init
# KubeRay runs login shells, which forget PATH.
RUN ln -s /opt/moescope/bin/moescope /opt/moescope/bin/ray /usr/local/bin/
# FlashInfer's sampler would want nvcc when the first request comes; vLLM's own needs none.
ENV PATH=/opt/moescope/bin:$PATH PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/data/hub VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0
USER 10001:10001
WORKDIR /data
VOLUME ["/data/traces", "/data/masks", "/data/hub"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["moescope-init", "moescope"]
# Ends at once unless MOESCOPE_ADMIN_KEY is set.
CMD ["serve", "allenai/OLMoE-1B-7B-0924-Instruct", "--host", "0.0.0.0", \
     "--store", "traces", "--masks", "masks"]
