# wantrain for rented machines: a folder of footage and a recipe in, a pipeline and LoRA files out (docs/installing.md).
# docker build -t wantrain .          for a CPU: docker build --build-arg DEVICE=cpu -t wantrain .
# docker run --gpus all --shm-size 16g -v "$PWD:/wantrain" wantrain FOOTAGE RECIPE [train.py's other settings]
ARG DEVICE=cuda
# The CUDA release that torch of constraints.txt is built with; nvcc is for the kernel that DeepSpeed builds (zero3_offload).
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
FROM ubuntu:24.04 AS cpu
FROM ${DEVICE}
ARG DEVICE

# Headers and g++: Triton and DeepSpeed compile when they are first used. libgl1 and libglib: of OpenCV, for scenes=split.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ libgl1 libglib2.0-0t64 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# torch first: the largest layer, which changes least. Its index has wheels without CUDA for a CPU.
WORKDIR /opt/wantrain
COPY constraints.txt ./
RUN index=; if [ "$DEVICE" = cpu ]; then index="--index-url https://download.pytorch.org/whl/cpu"; fi \
    && pip install --no-cache-dir --constraint constraints.txt $index torch
COPY . ./
RUN DS_BUILD_OPS=0 pip install --no-cache-dir --constraint constraints.txt ".[8bit,adaptive,quant,scenes,tensorboard]"
COPY --chmod=755 launch/start.sh /usr/local/bin/wantrain-start

# Any user may run it (docker run --user "$(id -u):$(id -g)"): what is written, caches too, is below /wantrain.
RUN mkdir --mode 1777 /wantrain
WORKDIR /wantrain
ENV HOME=/wantrain USER=wantrain
ENTRYPOINT ["wantrain-start"]
