# The command `kvstore` in an image: a wheel is built in one stage, installed in the other. BASE_IMAGE: any Python 3.11 to
# 3.13 on Debian. Locked versions; torch as the package index serves it (pass TORCH for a CPU build of your own index).
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY radix radix
COPY eviction eviction
COPY kvstore kvstore
COPY connectors connectors
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
ARG TORCH=torch==2.13.0
COPY requirements-dev.lock /tmp/
RUN python3 -m pip install --no-cache-dir -c /tmp/requirements-dev.lock "${TORCH}"
COPY --from=build /wheels /wheels
RUN python3 -m pip install --no-cache-dir -c /tmp/requirements-dev.lock "$(ls /wheels/*.whl)[demo,codecs]" \
    && useradd --create-home kvstore \
    && install -d -o kvstore -g kvstore /home/kvstore/.cache
USER kvstore
WORKDIR /home/kvstore
ENTRYPOINT ["kvstore"]
CMD ["--help"]
