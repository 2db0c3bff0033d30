# Runs the scripts on NVIDIA GPUs; "Docker" in docs/guide.md has the commands.
#
# The base is Debian 12, because constraints.txt was tested with its Python, 3.11. An image with CUDA would add gigabytes
# that nothing uses: the wheel of torch contains CUDA, and `docker run --gpus all` mounts the driver of the host.
FROM debian:bookworm-slim

# A run compiles kernels when it starts (torch.compile and Triton), which takes a C++ compiler and the headers of Python.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The packages are in a layer of their own, so that a change of the code does not install them again.
ARG PIP_ARGUMENTS="-r requirements.txt"
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY requirements.txt requirements-gpu.txt constraints.txt ./
RUN python3 -m venv /opt/venv && pip install --no-cache-dir $PIP_ARGUMENTS -c constraints.txt

# .dockerignore lists what is copied. The user cannot write to /app, so bytecode is compiled here.
COPY . .
RUN python -m compileall -q training scripts

# Everybody may write to /cache, so that `docker run --user "$(id -u):$(id -g)"` works with any user. Such a user has no
# name, for which libraries ask.
RUN useradd --uid 1000 --home-dir /cache --no-create-home trainer && mkdir --mode 1777 /cache
ENV HOME=/cache XDG_CACHE_HOME=/cache USER=trainer
VOLUME /cache
USER trainer
CMD ["python", "training/doctor.py", "--output_dir", "/cache"]
