# The server with the shipped student, on CPUs. For NVIDIA GPUs (torch has CUDA's libraries; the driver is the host's):
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS=s3,gpu .
# A tag may move. To pin the base image exactly, give its digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

# The project's dependencies in a virtual environment. This stage changes only with pyproject.toml and the pins.
FROM ${PYTHON_IMAGE} AS packages
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=s3
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/venv/bin:$PATH
# torch has its own layer, because it is the largest and changes least.
RUN python3 -m venv /opt/venv && pip install --index-url ${TORCH_INDEX} torch==${TORCH}
WORKDIR /source
COPY docker/constraints.txt docker/
ENV PIP_CONSTRAINT=/source/docker/constraints.txt
COPY pyproject.toml README.md ./
# Installs the project without its code, to get its dependencies in the versions of PIP_CONSTRAINT.
# hadolint ignore=DL3013
RUN pip install ".[${EXTRAS}]"

FROM packages AS project
COPY distill distill
COPY service service
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
# The server writes only to /data and /tmp, so the root filesystem may be read-only. Caches of libraries are in /tmp,
# and teachers that `distill fetch` downloads are in /data.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 \
    SERVICE_DATA=/data XDG_CACHE_HOME=/tmp/cache HF_HUB_CACHE=/data/hub
RUN useradd --uid 10001 --no-create-home --home-dir /data app && install --directory --owner app --group app /data
COPY --from=packages /opt/venv /opt/venv
RUN --mount=type=bind,from=project,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index --force-reinstall /wheels/*.whl
COPY docker/healthcheck.py /opt/healthcheck.py
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "/opt/healthcheck.py"]
ENTRYPOINT ["fgm-service"]
CMD ["serve", "--host", "0.0.0.0"]
