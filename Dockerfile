# The server with the shipped student. CPU by default; for NVIDIA GPUs:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS=[gpu] .
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

RUN useradd --create-home --uid 1000 app
WORKDIR /app
# torch alone first: the layer that changes least and weighs most
RUN pip install --index-url ${TORCH_INDEX} torch==2.13.0
COPY pyproject.toml README.md ./
COPY distill distill
COPY service service
RUN pip install ".${EXTRAS}"

USER app
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "/app/docker/healthcheck.py"]
COPY docker docker
STOPSIGNAL SIGTERM
ENTRYPOINT ["fgm-service", "serve", "--host", "0.0.0.0"]
