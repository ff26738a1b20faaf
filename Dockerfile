# The command `kvstore` in an image: everything is built into a virtual environment in one stage, which the other copies.
#
# BASE_IMAGE   any Python 3.11 to 3.13 on Debian, with pip and venv
# TORCH        the locked version
# TORCH_INDEX  where pip looks for it beside the package index: builds without CUDA, 3 GB smaller. Empty: with CUDA.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/kvstore/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements-dev.lock /tmp/
RUN python3 -m venv /opt/kvstore \
    && pip install -c /tmp/requirements-dev.lock ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /src
# First what we need of others: a change in our sources then installs nothing of it again.
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
RUN mkdir radix eviction kvstore connectors \
    && pip install -c /tmp/requirements-dev.lock ".[cluster,demo,codecs]" \
    && pip uninstall --yes kvtiers
COPY radix radix
COPY eviction eviction
COPY kvstore kvstore
COPY connectors connectors
RUN pip install --no-deps .

FROM ${BASE_IMAGE}
# The daemon's socket is its owner's alone, and so is what replicas load from it: every container is the same user.
RUN useradd --create-home --uid 1000 kvstore \
    && install -d -o kvstore -g kvstore /home/kvstore/.cache /run/kvstore
COPY --from=build /opt/kvstore /opt/kvstore
ENV PATH=/opt/kvstore/bin:$PATH PYTHONUNBUFFERED=1
USER kvstore
WORKDIR /home/kvstore
ENTRYPOINT ["kvstore"]
CMD ["--help"]
