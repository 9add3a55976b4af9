#!/usr/bin/env bash
# Installs lib/, include/ and share/ into PREFIX under DESTDIR: install.sh ARCHIVE VERSION PREFIX. ARCHIVE is the static library
# that cargo builds from runtime/capi. The shared library is linked here and not by cargo, because some crates define C functions,
# which rustc would export from it, too. ONNXRUNTIME=FILE also installs that library.
set -euo pipefail
archive=$1 version=$2 prefix=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${DESTDIR:-}$prefix
cc=${CC:-cc}

number() { sed -n "s/^#define $1 \([0-9]*\)$/\1/p" "$here/include/t5gemma.h"; }
major=$(number T5G_ABI_MAJOR) minor=$(number T5G_ABI_MINOR)
functions=$(sed -n 's/.*[ *]\(t5g_[a-z0-9_]*\)(.*/\1/p' "$here/include/t5gemma.h" | grep -v _default | sort -u)

mkdir -p "$root"/{include,lib/pkgconfig,lib/cmake/t5gemma,share/doc/t5gemma,share/t5gemma}
work=$(mktemp -d "$root/lib/.install.XXXXXX")
trap 'rm -rf "$work"' EXIT

case $(uname) in
Darwin)
    file=libt5gemma.$major.$minor.dylib soname=libt5gemma.$major.dylib plain=libt5gemma.dylib
    system="-framework CoreFoundation -lm"
    printf '_%s\n' $functions > "$work/symbols"
    "$cc" -dynamiclib -o "$work/$file" $(printf ' -Wl,-u,_%s' $functions) "$archive" \
        -Wl,-exported_symbols_list,"$work/symbols" -Wl,-dead_strip -Wl,-install_name,"@rpath/$soname" $system
    cp "$archive" "$work/libt5gemma.a"
    ;;
*)
    file=libt5gemma.so.$major.$minor soname=libt5gemma.so.$major plain=libt5gemma.so
    system="-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc"
    wanted=$(printf ' -Wl,-u,%s' $functions)
    # ONNX Runtime's threads and environment call into the library for as long as the process lives, so it stays loaded.
    "$cc" -shared -o "$work/$file" $wanted "$archive" -Wl,--version-script="$here/package/t5gemma.map" \
        -Wl,-soname,"$soname" -Wl,--gc-sections -Wl,-z,now,-z,relro,-z,nodelete -Wl,--no-undefined $system
    # One object whose only global symbols are the ABI, so that it can be linked with other Rust archives.
    "$cc" -r -nostdlib -o "$work/all.o" $wanted "$archive" -Wl,--gc-sections
    objcopy --wildcard --keep-global-symbol='t5g_*' --remove-section=.llvmbc --remove-section=.llvmcmd "$work/all.o"
    ar rcsD "$work/libt5gemma.a" "$work/all.o"
    ;;
esac
if [ -n "${STRIP-}" ]; then
    "$STRIP" --strip-debug "$work/$file" "$work/libt5gemma.a"
fi

# Renamed over existing files, so that running programs keep the old ones.
mv -f "$work/$file" "$work/libt5gemma.a" "$root/lib/"
ln -sfn "$file" "$root/lib/$soname"
ln -sfn "$soname" "$root/lib/$plain"
install -m 644 "$here/include/t5gemma.h" "$here/include/t5gemma.hpp" "$root/include/"
install -m 644 "$here/../../LICENSE" "$root/share/doc/t5gemma/"
install -m 644 "$here/package/valgrind.supp" "$root/share/t5gemma/"
fill() { sed -e "s|@VERSION@|$version|; s|@FILE@|$file|; s|@SONAME@|$soname|; s|@SYSTEM_LIBRARIES@|$system|" "$1" > "$2"; }
fill "$here/package/t5gemma.pc.in" "$root/lib/pkgconfig/t5gemma.pc"
for part in Config ConfigVersion; do
    fill "$here/package/t5gemma$part.cmake.in" "$root/lib/cmake/t5gemma/t5gemma$part.cmake"
done
if [ -n "${ONNXRUNTIME-}" ]; then
    case $plain in *.dylib) beside=libonnxruntime.dylib ;; *) beside=libonnxruntime.so ;; esac
    install -m 755 "$(readlink -f "$ONNXRUNTIME")" "$work/$beside"
    mv -f "$work/$beside" "$root/lib/"
fi
echo "installed libt5gemma $version (ABI $major.$minor) into $root"
