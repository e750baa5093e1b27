# Three images: `engine`, `operator` and `client` (Python with the openai SDK, for trying the endpoint from a pod).
#   docker build --target engine .                         the engine; add --build-arg EXTRAS=gpu for GPUs
#   docker build --target operator .                       the operator, without torch
# Order of the layers: base, dependencies (5 GB in the engine), model, code: a change of code rebuilds only the last, and
# for GPUs our own kernels, a minute's work.
ARG BASE_IMAGE=python:3.12-slim
ARG EXTRAS=""

# What builds the others: uv, and one requirements file for each extra of pyproject.toml.
FROM ${BASE_IMAGE} AS uv
RUN python3 -m venv /uv && /uv/bin/pip install --quiet --no-cache-dir uv
COPY pyproject.toml /
RUN mkdir /requirements && python3 -c "import pathlib, tomllib; \
extras = tomllib.loads(pathlib.Path('/pyproject.toml').read_text())['project']['optional-dependencies']; \
[pathlib.Path('/requirements', name + '.txt').write_text('\n'.join(names) + '\n') for name, names in extras.items()]" \
 && touch -d @0 /requirements/*

FROM ${BASE_IMAGE} AS base
# The root filesystem is read-only in a pod: nothing writes beside the code, and what must be written goes to /tmp.
ENV PATH=/opt/toka/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/opt/toka/src PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
RUN python3 -m venv --without-pip /opt/toka && mkdir /opt/toka/src

FROM base AS engine-dependencies
ARG EXTRAS
COPY --from=uv /requirements/engine.txt /requirements/gpu.txt /requirements/
COPY constraints.txt overrides.txt /requirements/
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    /uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/toka/bin/python \
    --constraint /requirements/constraints.txt --override /requirements/overrides.txt $(printf -- '-r /requirements/%s.txt ' engine ${EXTRAS})

# The converter is one file on purpose: no other change of the code converts again.
FROM engine-dependencies AS engine-model
COPY --from=uv /requirements/builtin.txt /requirements/
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    /uv/bin/uv pip install --quiet --no-cache --no-deps --python /opt/toka/bin/python \
    --constraint /requirements/constraints.txt -r /requirements/builtin.txt
COPY engine/toka_engine/convert_builtin.py /tmp/
RUN python /tmp/convert_builtin.py /opt/toka/models/smollm2

# The kernels for the GPUs that CUDA_ARCHITECTURES lists, compiled without one: a pod never compiles any. The compilers
# stay in these two stages. flashinfer's take long on few cores: few files on purpose, again.
FROM engine-dependencies AS engine-kernels
RUN apt-get update -q && apt-get install -q -y --no-install-recommends g++
COPY --from=uv /requirements/kernels.txt /requirements/
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    /uv/bin/uv pip install --quiet --no-cache --no-deps --python /opt/toka/bin/python \
    --constraint /requirements/constraints.txt -r /requirements/kernels.txt
COPY engine/toka_engine/errors.py /tmp/build/toka_engine/
COPY engine/toka_engine/output.py /tmp/build/toka_engine/
COPY engine/toka_engine/model/memory.py /tmp/build/toka_engine/model/
COPY engine/toka_engine/model/folders.py /tmp/build/toka_engine/model/
COPY engine/toka_engine/model/cuda/flashinfer_modules.py /tmp/build/toka_engine/model/cuda/
COPY engine/toka_engine/model/cuda/toolchain.py /tmp/build/toka_engine/model/cuda/
COPY engine/toka_engine/model/aot/__main__.py /tmp/build/toka_engine/model/aot/
ARG CUDA_ARCHITECTURES="9.0a"
RUN PYTHONPATH=/tmp/build python -m toka_engine.model.aot /opt/toka/kernels \
    --kinds fa2 fa3 --architectures ${CUDA_ARCHITECTURES}

# Our own, in Triton, take a minute: so all that a start of the model worker needs may be here, to ask what it compiles.
# Triton compiles modules that launch kernels too, with gcc and Python's headers, which a base may have.
FROM engine-kernels AS engine-triton
RUN headers=$(python -c 'import sysconfig; print(sysconfig.get_paths("posix_prefix")["include"])') \
 && { [ -e $headers/Python.h ] || { apt-get update -q && apt-get install -q -y --no-install-recommends libpython3-dev; }; }
COPY engine/toka_engine/*.py /tmp/build/toka_engine/
COPY engine/toka_engine/grammar /tmp/build/toka_engine/grammar
COPY engine/toka_engine/model /tmp/build/toka_engine/model
ARG CUDA_ARCHITECTURES="9.0a"
RUN PYTHONPATH=/tmp/build python -m toka_engine.model.aot /opt/toka/kernels \
    --kinds triton --architectures ${CUDA_ARCHITECTURES}

# Our own modules with their bytecode: a pod writes none, and its processes would compile them at each start. It is checked
# against the source's hash, so that a module which is replaced, or a copy with other times, is compiled as before.
FROM base AS engine-code
COPY engine/toka_engine /opt/toka/src/toka_engine
RUN python -m compileall -q --invalidation-mode checked-hash /opt/toka/src

FROM base AS operator-code
COPY operator/toka_operator /opt/toka/src/toka_operator
RUN python -m compileall -q --invalidation-mode checked-hash /opt/toka/src

# What differs between the engine's two images.
FROM engine-dependencies AS engine-cpu
FROM engine-dependencies AS engine-gpu
COPY --from=engine-triton /opt/toka/kernels /opt/toka/kernels
ENV TOKA_KERNELS_DIR=/opt/toka/kernels

# Libraries (kopf, torch) look the user up by name: uid 65532 has an entry.
FROM engine-${EXTRAS:-cpu} AS engine
COPY --from=uv /requirements/traces.txt /requirements/
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    /uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/toka/bin/python \
    --constraint /requirements/constraints.txt -r /requirements/traces.txt
COPY --from=engine-model /opt/toka/models /opt/toka/models
ENV TOKA_BUILTIN_DIR=/opt/toka/models
RUN printf '#!/opt/toka/bin/python\nimport sys\nfrom toka_engine.entry import main\nsys.exit(main())\n' >/opt/toka/bin/toka \
 && printf '#!/opt/toka/bin/python\nimport sys\nfrom toka_engine.scripts.ping import main\nsys.exit(main())\n' >/opt/toka/bin/toka-ping \
 && printf '#!/opt/toka/bin/python\nimport sys\nfrom toka_engine.scripts.download import main\nsys.exit(main())\n' >/opt/toka/bin/toka-download \
 && chmod 755 /opt/toka/bin/toka /opt/toka/bin/toka-ping /opt/toka/bin/toka-download \
 && echo 'toka:x:65532:65532::/tmp:/usr/sbin/nologin' >>/etc/passwd
EXPOSE 10210
ENTRYPOINT ["toka"]
USER 65532:65532
COPY --from=engine-code /opt/toka/src /opt/toka/src

FROM base AS operator-dependencies
COPY --from=uv /requirements/operator.txt /requirements/
COPY constraints.txt overrides.txt /requirements/
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    /uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/toka/bin/python \
    --constraint /requirements/constraints.txt --override /requirements/overrides.txt -r /requirements/operator.txt

FROM operator-dependencies AS operator
RUN printf '#!/opt/toka/bin/python\nimport sys\nfrom toka_operator.__main__ import main\nsys.exit(main())\n' >/opt/toka/bin/toka-operator \
 && chmod 755 /opt/toka/bin/toka-operator \
 && echo 'toka:x:65532:65532::/tmp:/usr/sbin/nologin' >>/etc/passwd
ENTRYPOINT ["toka-operator"]
USER 65532:65532
COPY --from=operator-code /opt/toka/src /opt/toka/src

FROM base AS client
COPY --from=uv /requirements/client.txt /requirements/
COPY constraints.txt overrides.txt /requirements/
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    /uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/toka/bin/python \
    --constraint /requirements/constraints.txt --override /requirements/overrides.txt -r /requirements/client.txt
RUN echo 'toka:x:65532:65532::/tmp:/usr/sbin/nologin' >>/etc/passwd
ENTRYPOINT ["python"]
USER 65532:65532
