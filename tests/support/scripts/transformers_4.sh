#!/usr/bin/env bash
# transformers 4.57 for the tests marked `transformers4`, with its hub client and tokenizers, in $TRANSFORMERS_4_DIR: laid
# in front of the installed packages by PYTHONPATH, so that torch is the same.
#
#   tests/support/scripts/transformers_4.sh install    once: about 20 MB to fetch, 135 MB on disk
#
# TRANSFORMERS_4_DIR (default build/transformers-4) is where it lives.
set -euo pipefail

ROOT=$(dirname "$0")/../../..
TRANSFORMERS_4_DIR=$(realpath -m "${TRANSFORMERS_4_DIR:-$ROOT/build/transformers-4}")

install() {
    [ -e "$TRANSFORMERS_4_DIR/.installed" ] && return
    rm -rf "$TRANSFORMERS_4_DIR"
    "$ROOT/.venv/bin/python" -m pip install --quiet --no-deps --target "$TRANSFORMERS_4_DIR" \
        "transformers==4.57.*" "huggingface-hub>=0.34,<1" "tokenizers>=0.22,<=0.23.0"
    touch "$TRANSFORMERS_4_DIR/.installed"
}

case ${1:-} in
    install) install ;;
    *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
