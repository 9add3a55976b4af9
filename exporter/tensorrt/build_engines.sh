#!/usr/bin/env bash
# Builds a TensorRT engine for each graph of this folder with trtexec, for a GPU of this machine, into @ENGINES@/.
# Engines that are up to date are kept. An engine that was built from other graphs, by another version of TensorRT or
# for another GPU is an error; --force rebuilds it.
#
#   bash build_engines.sh [--force] [--engines DIR] [option of trtexec ...]
#
# --engines DIR writes DIR/@ENGINES@/ and wrappers of the engines to DIR instead, for a read-only model folder;
# `t5gemma --engines DIR` finds them there. trtexec's --device=N is the GPU by nvidia-smi's index, by default 0.
# ONNX Runtime, and with it t5gemma, runs engines of TensorRT 10 only.
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

# trtexec numbers the GPUs that CUDA shows it; this makes the order that of nvidia-smi.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
device=0 previous=''
for argument in "$@"; do
    case $argument in
        --force|--engines|--engines=*) fail "$argument must come before the options of trtexec" 2 ;;
        --device=*) device=${argument#*=} ;;
        *) if [ "$previous" = --device ]; then device=$argument; fi ;;
    esac
    previous=$argument
done
case $device in ''|*[!0-9]*) fail "--device: expected the index of a GPU, found '$device'" 2 ;; esac
if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
    IFS=, read -r -a visible <<< "$CUDA_VISIBLE_DEVICES"
    [ "$device" -lt "${#visible[@]}" ] ||
        fail "--device: expected a GPU of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES, found $device"
    device=${visible[$device]}
fi
gpus=$(nvidia-smi -i "$device" --query-gpu=name,compute_cap --format=csv,noheader) ||
    fail "nvidia-smi finds no GPU $device: $gpus"
# Not `nvidia-smi | sed`: a program whose pipe closes early fails.
gpu=$(sed -n 1p <<< "$gpus")
[ -n "$gpu" ] || fail "nvidia-smi prints nothing for GPU $device"
uses_fp8=@USES_FP8@
if $uses_fp8; then
    # The last field is the compute capability.
    case ${gpu##*, } in
        [0-7].*|8.[0-8]) fail "the graphs compute in fp8, which requires @FP8_GPUS@ (got $gpu)" ;;
    esac
fi
help=$(trtexec --help 2>&1) || true
version=$(sed -n 's/.*TensorRT[.v ]*\([0-9][0-9.]*\).*/\1/p' <<< "$help" | sed -n 1p)
case $version in
    1[1-9]*) echo "build_engines.sh: ONNX Runtime and t5gemma require TensorRT 10 (got $version)" >&2 ;;
esac
mkdir -p "$out/@ENGINES@" || fail "$out/@ENGINES@ cannot be created; choose another folder with --engines DIR"
[ -w "$out/@ENGINES@" ] || fail "$out/@ENGINES@ cannot be written; choose another folder with --engines DIR"
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
        if [ "$(cat "$plan.stamp" 2>/dev/null)" = "$stamp" ]; then echo "$plan is up to date"; return; fi
        echo "build_engines.sh: $plan is not up to date:" >&2
        echo "  expected: $stamp" >&2
        echo "  found:    $(cat "$plan.stamp" 2>/dev/null || echo no stamp file)" >&2
        echo "  rebuild it with --force, or remove it" >&2
        exit 1
    fi
    echo "building $plan"
    part=$plan.part
    trtexec --onnx="$here/$stem.onnx" --saveEngine="$part" --timingCacheFile=@ENGINES@/timing.cache "$@"
    [ -s "$part" ] || fail "trtexec wrote no engine for $stem.onnx"
    rm -f "$plan.stamp"
    mv "$part" "$plan"
    part=''
    printf '%s\n' "$stamp" > "$plan.stamp"
}

# The graphs define all types. TensorRT 10 needs this option to respect them; later versions have no other mode.
typed=(--stronglyTyped)
case $version in 1[1-9]*) typed=();; esac

@BUILDS@