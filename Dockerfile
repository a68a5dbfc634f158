# One image for all of Tripfold: the command says which service a container is. See docker-compose.yml.
ARG PYTHON_IMAGE=python:3.13-slim

# What Tripfold depends on: made again only when the pinned requirements change. pip installs from outside the virtual
# environment, so that the environment holds no installer.
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CACHE_DIR=/var/cache/pip
RUN python -m venv --without-pip /opt/tripfold
COPY requirements/runtime.txt requirements/
RUN --mount=type=cache,target=/var/cache/pip \
    pip --python /opt/tripfold/bin/python install --require-hashes -r requirements/runtime.txt

# Tripfold itself, installed under /project: a change of code is a layer of some hundred kilobytes.
FROM dependencies AS project
WORKDIR /build
COPY requirements/build.txt requirements/
RUN --mount=type=cache,target=/var/cache/pip \
    python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY services services
COPY shared shared
COPY tripfold tripfold
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && pip --python /opt/tripfold/bin/python install --no-deps --no-index --root /project dist/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Tripfold" \
      org.opencontainers.image.description="Folds a transit authority's raw trip files into exact per-country, per-day statistics." \
      org.opencontainers.image.licenses="Apache-2.0"
# Byte code is compiled above; the container's file system may be read-only.
ENV PATH=/opt/tripfold/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=dependencies /opt/tripfold /opt/tripfold
COPY --from=project /project/opt/tripfold /opt/tripfold
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /tmp
# 8080: the API. 8081: health and metrics of the other services.
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
ENTRYPOINT ["tripfold"]
