# M1 on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t m1-cuda .
# docker run -it --gpus all -v "$PWD:/work" m1-cuda doctor
FROM python:3.11-slim

# torch's wheel has CUDA's libraries and Triton. Triton compiles a small C file for the driver, so it needs a compiler, too.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

COPY requirements/torch.txt requirements/lock.txt /tmp/requirements/
RUN pip install --no-cache-dir -r /tmp/requirements/torch.txt \
 && pip install --no-cache-dir --require-hashes --no-deps -r /tmp/requirements/lock.txt

COPY pyproject.toml README.md LICENSE /tmp/m1/
COPY src /tmp/m1/src
RUN pip install --no-cache-dir --no-deps /tmp/m1 && rm -rf /tmp/m1

RUN useradd --create-home m1 && mkdir /work && chown m1 /work
USER m1
WORKDIR /work
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["m1"]
CMD ["--help"]
