# M1 on CPUs: docker build -f docker/cpu.Dockerfile -t m1 . && docker run -it -v "$PWD:/work" m1 doctor
FROM python:3.11-slim

# The kernels are compiled on first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

COPY requirements/torch.txt requirements/lock.txt /tmp/requirements/
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu -r /tmp/requirements/torch.txt \
    --extra-index-url https://pypi.org/simple \
 && pip install --no-cache-dir --require-hashes --no-deps -r /tmp/requirements/lock.txt

COPY pyproject.toml README.md LICENSE /tmp/m1/
COPY src /tmp/m1/src
RUN pip install --no-cache-dir --no-deps /tmp/m1 && rm -rf /tmp/m1

RUN useradd --create-home m1 && mkdir /work && chown m1 /work
USER m1
WORKDIR /work
ENTRYPOINT ["m1"]
CMD ["--help"]
