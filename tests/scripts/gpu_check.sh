#!/usr/bin/env bash
# The checks that need a machine with an NVIDIA GPU (`make gpu-check`): which providers work; golden tensors and cases on CUDA
# in float32, float16 and bfloat16, and through TensorRT and TensorRT for RTX where they are installed; whether CUDA graphs
# change a token; whether GPU memory holds the weights once; speed of dummy models compared with the memory's bandwidth, with
# CUDA graphs too, and with transformers where torch is installed.
#
#   gpu_check.sh EXPORTER T5GEMMA OUT [--sizes "2b-2b 9b-2b"] [--device N] [--quick]
#
# Every step is a line of OUT/summary.txt: ok, FAIL, or skip with the reason. The exit status is 1 if a step fails, or if no
# GPU provider is available. docs/src/gpu.md says which of this was run on which machine.
set -uo pipefail
exporter=$1 t5gemma=$2 out=$3
shift 3
sizes="2b-2b 9b-2b" device=0 quick=
while [ $# -gt 0 ]; do
    case $1 in
        --sizes) sizes=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --quick) quick=1; shift ;;
        *) echo "gpu_check.sh: unknown option $1" >&2; exit 2 ;;
    esac
done
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fixtures=$here/../fixtures/public
python=${T5GEMMA_PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
: > "$summary"
failed=0

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# step NAME COMMAND...: runs the command, with its output in a file of that name
step() {
    local name=$1 log=$out/${1//[^A-Za-z0-9._-]/_}.log start=$SECONDS
    shift
    if "$@" > "$log" 2>&1; then
        say "ok    $name ($((SECONDS - start)) s)"
    else
        say "FAIL  $name ($((SECONDS - start)) s), see $log:"
        tail -n 3 "$log" | sed 's/^/        /' | tee -a "$summary"
        failed=1
        return 1
    fi
}

skip() { say "skip  $1: $2"; }

export_as() { rm -rf "$2" && "$exporter" --quiet "${@:3}" "$1" "$2"; }

say "t5gemma $("$t5gemma" --version 2>&1 | head -n 1), $(uname -sm), $(date -u +%F)"
if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee -a "$summary"
else
    say "no nvidia-smi: no NVIDIA driver here"
fi
"$t5gemma" doctor --device "$device" > "$out/doctor.log" 2>&1
sed 's/^/    /' "$out/doctor.log" | tee -a "$summary"

ready() { grep -q -- "--provider $1: ready" "$out/doctor.log"; }

# golden MODEL FIXTURE DTYPE ARGUMENTS...: checks tensors against limits, and in float32 also tokens
golden() {
    local model=$1 fixture=$2 dtype=$3
    shift 3
    "$t5gemma" verify "$model" --golden "$fixtures/$fixture/golden.safetensors" "$@" || return 1
    "$python" "$here/golden_cases.py" "$t5gemma" "$model" "$fixtures/$fixture" --dtype "$dtype" -- "$@"
}

# same_tokens MODEL FIXTURE DTYPE OPTION ARGUMENTS...: checks that a provider option changes no token
same_tokens() {
    local model=$1 fixture=$2 dtype=$3 option=$4 tokens
    shift 4
    tokens=$out/tokens-$(basename "$model")
    "$python" "$here/golden_cases.py" "$t5gemma" "$model" "$fixtures/$fixture" --dtype "$dtype" --tokens "$tokens-without" -- \
        "$@" || return 1
    "$python" "$here/golden_cases.py" "$t5gemma" "$model" "$fixtures/$fixture" --dtype "$dtype" --tokens "$tokens-with" -- \
        "$@" ${option:+--provider-option "$option"} || return 1
    [ -s "$tokens-with" ] && cmp "$tokens-without" "$tokens-with"
}

# All providers on tiny models, in each of their types and cache layouts. The CPU provider is included to test this script on
# machines without a GPU.
providers="cpu cuda tensorrt nv-tensorrt-rtx"
for provider in $providers; do
    if ! ready "$provider"; then
        reason=$(grep -- "--provider $provider:" "$out/doctor.log" | sed "s/.*--provider $provider: //")
        skip "$provider" "${reason:-not tried}"
        continue
    fi
    dtypes="float32 float16 bfloat16" target=cuda given=(--provider "$provider" --device "$device")
    case $provider in
        cpu) dtypes=float32 given=() ;;
        tensorrt | nv-tensorrt-rtx) target=tensorrt ;;
    esac
    for fixture in tiny-balanced tiny-unbalanced; do
        for dtype in $dtypes; do
            layouts="as-is"
            if [ $target = tensorrt ] || [ "$provider" = cpu ]; then layouts="as-is static"; fi
            for layout in $layouts; do
                model=$out/models/$provider-$fixture-$dtype-$layout
                # Enough candidates for the cases with beams, so that top-k runs on the GPU.
                how=(--target $target --dtype "$dtype" --candidates 12)
                if [ $layout = static ]; then how=(--target tensorrt --dtype "$dtype" --candidates 12 --cache static=64); fi
                case ${how[1]} in
                    tensorrt) how+=(--plan "batch=1..8,source=1..64,target=64,beams=1..8,prompt=1..16") ;;
                esac
                name="$provider $fixture $dtype $layout"
                step "export $name" export_as "$fixtures/$fixture/checkpoint" "$model" "${how[@]}" || continue
                if [ $target = tensorrt ]; then
                    step "engines $name" "$t5gemma" build-engines "$model" "${given[@]}" || continue
                fi
                step "golden $name" golden "$model" "$fixture" "$dtype" ${given[@]+"${given[@]}"}
                case $provider in
                    cuda) [ "$dtype" = float32 ] || step "CUDA graphs $name" \
                        same_tokens "$model" "$fixture" "$dtype" enable_cuda_graph=1 "${given[@]}" ;;
                    # Tests the step itself.
                    cpu) step "same tokens $name" same_tokens "$model" "$fixture" "$dtype" "" ;;
                esac
            done
        done
    done
done

# Speed, with random weights. Models that do not fit on the disk fail their export and are left out.
bench() { "$t5gemma" bench "$@" --max-new-tokens 64 --source-length 512 --repeat 3 --json; }
# most_memory COMMAND...: runs the command and prints the maximum MiB of GPU memory of its process, or 0
most_memory() {
    local most=0 used pid
    "$@" > /dev/null &
    pid=$!
    while kill -0 $pid 2> /dev/null; do
        used=$(nvidia-smi --id="$device" --query-compute-apps=pid,used_memory --format=csv,noheader,nounits 2> /dev/null \
            | awk -F ', *' -v pid=$pid '$1 == pid { print $2 + 0 }')
        [ "${used:-0}" -gt $most ] && most=$used
        sleep 0.2
    done
    wait $pid || return 1
    echo $most
}

# weights_once MODEL ARGUMENTS...: checks that a short source takes little more GPU memory than the weights. A copy for each
# graph would take half as much again if the decoder is as large as the encoder.
weights_once() {
    local model=$1 weights used
    shift
    weights=$(($(stat -c %s "$model/model.onnx_data") >> 20))
    used=$(most_memory "$t5gemma" bench "$model" "$@" --max-new-tokens 16 --source-length 16 --repeat 1 --json) || return 1
    echo "$used MiB of the GPU's memory for $weights MiB of weights"
    if [ "$used" = 0 ]; then
        echo "nvidia-smi does not report the memory of processes, as in some containers: check by hand"
        return 0
    fi
    [ "$used" -ge "$weights" ] && [ "$used" -le $((weights * 5 / 4 + 1536)) ]
}

if [ -n "$quick" ]; then sizes=s-s; fi
for size in $sizes; do
    provider=cuda
    if ! ready cuda; then
        skip "bench $size" "no CUDA"
        [ -n "$quick" ] && provider=cpu || continue
    fi
    model=$out/models/$size-$provider
    how=(--target cuda --dummy-weights --preset "$size" --candidates 16) given=(--provider cuda --device "$device")
    if [ $provider = cpu ]; then how+=(--dtype float32) given=(); fi
    rm -rf "$model"
    step "export $size" "$exporter" --quiet "${how[@]}" "$model" || continue
    for batch in 1 32; do
        if [ $provider = cpu ] && [ $batch = 32 ]; then continue; fi
        step "bench $size batch $batch" bench "$model" --batch-size $batch ${given[@]+"${given[@]}"} \
            && cp "$out/bench_${size}_batch_$batch.log" "$out/bench-$size-$batch.json"
    done
    if [ $provider = cuda ]; then
        step "weights once $size" weights_once "$model" "${given[@]}" && tail -n 2 "$out/weights_once_$size.log" | tee -a "$summary"
        step "bench $size batch 1 CUDA graphs" bench "$model" --batch-size 1 "${given[@]}" \
            --provider-option enable_cuda_graph=1 && cp "$out/bench_${size}_batch_1_CUDA_graphs.log" "$out/bench-$size-1-graphs.json"
    else
        skip "weights once $size, CUDA graphs" "no CUDA"
    fi
    if "$python" -c 'import torch, transformers; assert torch.cuda.is_available()' 2> /dev/null; then
        step "transformers $size" "$python" "$here/bench_transformers.py" "$size" --batch 1 32 --device "$device"
    else
        skip "transformers $size" "torch with CUDA and transformers are not installed for $python"
    fi
    rm -rf "$model"
done

say ""
if ! ready cuda && ! ready tensorrt && ! ready nv-tensorrt-rtx; then
    say "no GPU provider is available: nothing was checked on a GPU"
    exit 1
fi
if [ $failed = 0 ]; then say "all steps that could run passed"; else say "some steps failed"; fi
exit $failed
