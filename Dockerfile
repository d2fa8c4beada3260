# zo_offload on a CPU, or on a GPU with TORCH_INDEX=https://download.pytorch.org/whl/cu130 and the host's driver.
#
#   docker build -t zo-offload .
#   docker run --rm -v "$PWD:/work" -w /work zo-offload fit CHECKPOINT --data train.jsonl --offload disk --run-dir runs/a
#
# Blocks are written below --run-dir: mount a folder of a local drive there. With GPUs: docker run --gpus all --ulimit memlock=-1.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "$TORCH" --index-url "$TORCH_INDEX"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl peft datasets gguf && rm -r /wheels
ENTRYPOINT ["zo-offload"]
CMD ["doctor"]
