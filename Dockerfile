# NVIDIA's PyTorch image brings torch, Triton, Transformer Engine and apex, built for each other.
# None of them may be replaced, so what is there is pinned before anything is installed; a
# requirement that cannot live with it fails the build.
#
#   docker build -t fp4pretrain .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD/runs:/workspace/runs" \
#       fp4pretrain train model=tiny
#   docker build --target dev -t fp4pretrain-dev .     what tests and checks need, for a checkout:
#   docker run --rm --gpus all -v "$PWD:/workspace" fp4pretrain-dev python -m pytest tests/gpu
ARG NGC=26.05
FROM nvcr.io/nvidia/pytorch:${NGC}-py3 AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What it needs, in a layer of its own: it is built again only when pyproject.toml changes.
COPY pyproject.toml /opt/fp4pretrain/
RUN pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|pytorch-triton|transformer[-_]engine|apex)==' \
        > /opt/keep.txt \
    && python -c "import tomllib; p = tomllib.load(open('/opt/fp4pretrain/pyproject.toml', 'rb')); print(*p['project']['dependencies'], sep='\n')" \
        > /opt/needs.txt \
    && pip install --no-cache-dir -c /opt/keep.txt -r /opt/needs.txt \
    && pip list --format=freeze | grep -Fxf /opt/keep.txt | cmp - /opt/keep.txt

COPY . /opt/fp4pretrain
RUN pip install --no-cache-dir --no-deps /opt/fp4pretrain \
    && useradd --create-home --uid 10001 trainer \
    && install -d -o trainer -g trainer /workspace/runs
WORKDIR /workspace

FROM base AS dev
RUN pip install --no-cache-dir -c /opt/keep.txt '/opt/fp4pretrain[dev]' \
    && pip list --format=freeze | grep -Fxf /opt/keep.txt | cmp - /opt/keep.txt
USER trainer
CMD ["bash"]

# torchrun and the launch scripts: docker run --entrypoint /opt/fp4pretrain/launch/torchrun.sh ...
FROM base AS run
USER trainer
ENTRYPOINT ["fp4pretrain"]
CMD ["--help"]
