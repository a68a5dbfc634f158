# One image for all services: the command of a container chooses the service. See docker-compose.yml.
ARG PYTHON_IMAGE=python:3.13-slim

# Dependencies: this stage is rebuilt only when the pinned requirements change. pip installs from outside the virtual
# environment, so that the environment has no installer.
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CACHE_DIR=/var/cache/pip
RUN python -m venv --without-pip /opt/tripfold
COPY requirements/runtime.txt requirements/
RUN --mount=type=cache,target=/var/cache/pip \
    pip --python /opt/tripfold/bin/python install --require-hashes -r requirements/runtime.txt

# Tripfold itself, installed under /project: a code change makes a layer of a few hundred kilobytes.
FROM dependencies AS project
WORKDIR /build
COPY requirements/build.txt requirements/
RUN --mount=type=cache,target=/var/cache/pip \
    python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY services services
COPY shared shared
COPY tripfold tripfold
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist ./client . \
    && pip --python /opt/tripfold/bin/python install --no-deps --no-index --root /project dist/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Tripfold" \
      org.opencontainers.image.description="Folds a transit authority's raw trip files into exact per-country, per-day statistics." \
      org.opencontainers.image.licenses="Apache-2.0"
# The stages above compile byte code, because the container's file system may be read-only.
ENV PATH=/opt/tripfold/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# In a container, published ports and the probes of an orchestrator come from outside.
ENV TRIPFOLD_API_HOST=0.0.0.0 TRIPFOLD_HEALTH_HOST=0.0.0.0
COPY --from=dependencies /opt/tripfold /opt/tripfold
COPY --from=project /project/opt/tripfold /opt/tripfold
# A numeric user, so that an orchestrator can check that it is not root.
USER 10001:10001
WORKDIR /tmp
# 8080: the API. 8081: health and metrics of the other services.
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# Healthy means ready: the service has started, and S3 and Kafka can be used.
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-m", "tripfold.healthcheck"]
ENTRYPOINT ["tripfold"]
