#!/usr/bin/env bash
# Builds an engine for each graph of this folder with TensorRT's trtexec, for a GPU of this machine, into @ENGINES@/.
# What is built already is left as it is. What was built of other graphs, by another TensorRT or for another GPU is refused:
# --force builds it anew.
#
#   bash build_engines.sh [--force] [--engines DIR] [option of trtexec ...]
#
# --engines DIR writes DIR/@ENGINES@/ and the wrappers of the engines into DIR instead, for a folder that cannot be written;
# `t5gemma --engines DIR` finds them there. --device=N, of trtexec, is the GPU by nvidia-smi's number; the first without it.
# ONNX Runtime, and t5gemma with it, runs engines of TensorRT 10; those of 11 are for other programs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "build_engines.sh: $1" >&2; exit "${2-1}"; }
force='' out=$here
while [ $# -gt 0 ]; do
    case $1 in
        --force) force=1 ;;
        --engines=*) out=${1#*=} ;;
        --engines) [ $# -gt 1 ] || fail "--engines: expected a folder, found none" 2; out=$2; shift ;;
        -h|--help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        *) break ;;
    esac
    shift
done
[ -n "$out" ] || fail "--engines: expected a folder, found none" 2
for tool in trtexec nvidia-smi; do
    command -v "$tool" >/dev/null || fail "$tool is not installed or not in PATH"
done

# trtexec counts the GPUs that CUDA shows it; by the bus, as nvidia-smi does.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
device=0 previous=''
for argument in "$@"; do
    case $argument in
        --force|--engines|--engines=*) fail "$argument: expected before the options of trtexec" 2 ;;
        --device=*) device=${argument#*=} ;;
        *) if [ "$previous" = --device ]; then device=$argument; fi ;;
    esac
    previous=$argument
done
case $device in ''|*[!0-9]*) fail "--device: expected the number of a GPU, found '$device'" 2 ;; esac
if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
    IFS=, read -r -a visible <<< "$CUDA_VISIBLE_DEVICES"
    [ "$device" -lt "${#visible[@]}" ] ||
        fail "--device: expected a GPU of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES, found $device"
    device=${visible[$device]}
fi
gpus=$(nvidia-smi -i "$device" --query-gpu=name,compute_cap --format=csv,noheader) ||
    fail "nvidia-smi does not know the GPU $device: $gpus"
# Read whole before the first line is taken: what writes into a pipe that is closed early fails.
gpu=$(sed -n 1p <<< "$gpus")
[ -n "$gpu" ] || fail "nvidia-smi says nothing of the GPU $device"
@FLOAT8@told=$(trtexec --help 2>&1) || true
version=$(sed -n 's/.*TensorRT[.v ]*\([0-9][0-9.]*\).*/\1/p' <<< "$told" | sed -n 1p)
case $version in
    1[1-9]*) echo "build_engines.sh: engines of TensorRT $version cannot be run by ONNX Runtime and t5gemma, which need 10" >&2 ;;
esac
mkdir -p "$out/@ENGINES@" || fail "$out/@ENGINES@ cannot be made; name another folder with --engines DIR"
[ -w "$out/@ENGINES@" ] || fail "$out/@ENGINES@ cannot be written; name another folder with --engines DIR"
cd "$out"

part=''
trap '[ -z "$part" ] || rm -f "$part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

build() {
    local stem=$1 hash=$2 plan=@ENGINES@/$1.plan; shift 2
    local stamp="graph $hash, weights @WEIGHTS@, TensorRT ${version:-unknown}, $gpu"
    if [ "$out" != "$here" ] && ! cmp -s "$here/${stem}_ctx.onnx" "${stem}_ctx.onnx"; then
        cp "$here/${stem}_ctx.onnx" "${stem}_ctx.onnx"
    fi
    if [ -e "$plan" ] && [ -z "$force" ]; then
        if [ "$(cat "$plan.stamp" 2>/dev/null)" = "$stamp" ]; then echo "$plan is built"; return; fi
        echo "build_engines.sh: $plan was built for something else:" >&2
        echo "  expected: $stamp" >&2
        echo "  found:    $(cat "$plan.stamp" 2>/dev/null || echo nothing said)" >&2
        echo "  remove it, or build it anew with --force" >&2
        exit 1
    fi
    echo "building $plan"
    part=$plan.part
    trtexec --onnx="$here/$stem.onnx" --saveEngine="$part" --timingCacheFile=@ENGINES@/timing.cache "$@"
    [ -s "$part" ] || fail "trtexec has written no engine for $stem.onnx"
    rm -f "$plan.stamp"
    mv "$part" "$plan"
    part=''
    printf '%s\n' "$stamp" > "$plan.stamp"
}

# The types are in the graphs; TensorRT 10 has to be told, later ones know no other way.
typed=(--stronglyTyped)
case $version in 1[1-9]*) typed=();; esac

@BUILDS@