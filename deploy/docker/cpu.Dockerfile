# moescope on CPUs: for small models and for a look around. From the repository's root:
#   docker build -f deploy/docker/cpu.Dockerfile -t moescope:cpu .
FROM python:3.11.14-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/moescope/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/moescope \
    && pip install --no-deps --index-url "$TORCH_INDEX" torch==2.13.0+cpu
COPY requirements/cpu.lock ./
# The lock is the developers': what follows is the part of it that an image needs, without the
# tools, and without Triton, which is 1 GB and has nothing to do on a CPU.
COPY deploy/docker/tools.txt ./
RUN grep -vf tools.txt cpu.lock > image.lock && pip install --no-deps -r image.lock
COPY pyproject.toml README.md LICENSE ./
COPY tracer tracer
COPY analysis analysis
COPY server server
COPY clients clients
COPY deploy/*.py deploy/py.typed deploy/
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11.14-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1=2.0.16-1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --create-home moescope \
    && install --directory --owner 10001 --group 10001 /data /data/traces /data/masks /data/hub
COPY --from=build /opt/moescope /opt/moescope
COPY --chmod=755 deploy/docker/init.py /usr/local/bin/moescope-init
COPY examples/specimen /models/specimen
# KubeRay runs login shells, which forget PATH.
RUN ln -s /opt/moescope/bin/moescope /opt/moescope/bin/ray /usr/local/bin/
ENV PATH=/opt/moescope/bin:$PATH PYTHONUNBUFFERED=1 \
    HF_HOME=/data/hub VLLM_NO_USAGE_STATS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
USER 10001:10001
WORKDIR /data
VOLUME ["/data/traces", "/data/masks", "/data/hub"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["moescope-init", "moescope"]
# Without a compiler in the image models run eagerly. Ends at once unless MOESCOPE_ADMIN_KEY is set.
CMD ["serve", "/models/specimen", "--host", "0.0.0.0", "--store", "traces", "--masks", "masks", \
     "--", "--served-model-name", "specimen", "--max-model-len", "128", "--enforce-eager", \
     "--dtype", "float32", "--attention-backend", "CPU_MLA"]
