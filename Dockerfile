# NVIDIA's PyTorch image brings torch, Triton, Transformer Engine and apex, built for each other.
# None of them may be replaced, so what is there is pinned before anything is installed; a
# requirement that cannot live with it fails the build.
#
#   docker build -t fp4pretrain .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" \
#       fp4pretrain train model=tiny
ARG NGC=26.05
FROM nvcr.io/nvidia/pytorch:${NGC}-py3

COPY . /opt/fp4pretrain
RUN pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|pytorch-triton|transformer[-_]engine|apex)==' \
        > /tmp/keep.txt \
    && pip install --no-cache-dir -c /tmp/keep.txt /opt/fp4pretrain \
    && pip list --format=freeze | grep -Fxf /tmp/keep.txt | cmp - /tmp/keep.txt \
    && rm /tmp/keep.txt

# torchrun and the launch scripts: docker run --entrypoint /opt/fp4pretrain/launch/torchrun.sh ...
WORKDIR /workspace
ENTRYPOINT ["fp4pretrain"]
CMD ["--help"]
