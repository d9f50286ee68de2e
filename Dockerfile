# docker build -t regtome . && docker run --gpus all --shm-size 8g -v /data:/data regtome main.py --help
# Docker's default of 64 MB shared memory is too small for loader processes: give --shm-size, or --num_workers 0.
FROM python:3.11-slim

# g++ is for --compile; git names the commit in args.json
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*

WORKDIR /regtome
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

ENTRYPOINT ["python"]
CMD ["main.py", "--help"]
