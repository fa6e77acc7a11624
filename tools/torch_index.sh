#!/bin/sh
# Prints the pip options for PyTorch: its CPU index on a Linux machine without an NVIDIA driver, where it can be reached.
# Arguments: a Python to ask the network with, the address of the index.
[ "$(uname -s)" = Linux ] || exit 0
command -v nvidia-smi >/dev/null 2>&1 && exit 0
"$1" - "$2" 2>/dev/null <<'ASK' && echo "--extra-index-url $2"
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=4)
ASK
exit 0
