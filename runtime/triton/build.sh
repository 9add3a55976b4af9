#!/usr/bin/env bash
# Builds the backend for Triton over an installed libt5gemma: build.sh PREFIX FOLDER. FOLDER becomes the backend's folder, to be
# called `t5gemma` under Triton's --backend-directory; it needs nothing but itself. ONNXRUNTIME=FILE is put into it, if PREFIX
# has no libonnxruntime.so. Linux only, as Triton is.
set -euo pipefail
prefix=$1 folder=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT
# One translation unit: t5gemma.hpp is most of what there is to compile. Triton's functions stay undefined: its server has them.
(cd "$here/src" && for file in *.cc; do [ "$file" = check.cc ] || echo "#include \"$file\""; done) |
    "${CXX:-c++}" -std=c++17 -O2 -Wall -Wextra -Wshadow ${CXXFLAGS-} -fPIC -shared -fvisibility=hidden -I"$here/src" \
        -isystem "$prefix/include" -x c++ - -o "$work/libtriton_t5gemma.so" -L"$prefix/lib" -lt5gemma -pthread \
        -Wl,-rpath,'$ORIGIN' -Wl,-z,now,-z,relro
[ -z "${STRIP-}" ] || "$STRIP" --strip-debug "$work/libtriton_t5gemma.so"
cp -P "$prefix"/lib/libt5gemma.so.* "$work/"
onnxruntime=$prefix/lib/libonnxruntime.so
[ -e "$onnxruntime" ] || onnxruntime=${ONNXRUNTIME:?PREFIX has no libonnxruntime.so, and ONNXRUNTIME does not name one}
install -m 755 "$(readlink -f "$onnxruntime")" "$work/libonnxruntime.so"
install -m 644 "$root/LICENSE" "$work/"
chmod 755 "$work"
# A server that runs keeps the files that it has open.
rm -rf "$folder"
mv "$work" "$folder"
echo "built $folder"
