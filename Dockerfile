# docker build -t student . && docker run -p 8000:8000 -v $PWD/EXPORT:/student student
FROM python:3.11-slim

WORKDIR /build
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY lit_distill lit_distill
COPY configs configs
# the wheels of this index, which pip prefers, are without CUDA's gigabytes
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url $TORCH -c constraints.txt ".[serve,ctranslate2]"

WORKDIR /
RUN useradd --create-home student
USER student
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
# the server gets SIGTERM itself, and ends with what is in flight answered
ENTRYPOINT ["lit-distill", "serve", "/student", "--host", "0.0.0.0"]
