# For NVIDIA cards: docs/operate.md. torch's wheel brings CUDA; Triton and the C loops need a C compiler.
FROM python:3.12-slim
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lightning-qlora
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY lightning_qlora lightning_qlora
RUN pip install --no-cache-dir --constraint lightning_qlora/constraints.txt ".[hf,cli,paged,chat]"
RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer
CMD ["lightning-qlora", "doctor"]
