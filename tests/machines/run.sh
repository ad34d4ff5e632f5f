#!/usr/bin/env bash
# Runs a command as on another machine: bash tests/machines/run.sh MACHINE COMMAND ...
#
#   avx2         a processor without AVX-512: torch and MKL with AVX2, no oneDNN, C kernels compiled for x86-64-v3
#   avx512       a processor with AVX-512 and without its bf16 instructions
#                (on an x86 processor without AVX-512 both say so, and run nothing: `make test` is their run)
#   no-compiler  no C compiler on PATH
#   elsewhere    a folder for temporary files whose path has 200 characters, and a locale in ISO-8859-1: in ASCII
#                torch.compile fails, because torch reads its own sources in the encoding of the locale
#   nobody       a user that is not root, and whose home does not exist
#
# The cache folder of the C kernels is empty in each of them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
machine=$1
shift
own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
export XDG_CACHE_HOME="$own/cache"

# Whether this machine is an x86 processor without AVX-512.
without_avx512() {
  grep -qsw avx2 /proc/cpuinfo && ! grep -qsw avx512f /proc/cpuinfo
}

avx2() {
  mkdir "$own/bin"
  printf '#!/bin/bash\nexec %s "${@/-march=native/-march=x86-64-v3}"\n' "$(command -v gcc)" >"$own/bin/gcc"
  chmod +x "$own/bin/gcc"
  export PATH="$own/bin:$PATH" PYTHONPATH="$here/no_onednn${PYTHONPATH:+:$PYTHONPATH}"
  ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 "$@"
}

avx512() {
  ONEDNN_MAX_CPU_ISA=AVX512_CORE "$@"
}

no-compiler() {
  mkdir "$own/bin"
  IFS=: read -ra folders <<<"$PATH"
  for folder in "${folders[@]}"; do
    ln -s "$folder"/* "$own/bin/" 2>/dev/null || true # the first program of a name counts
  done
  (cd "$own/bin" && rm -f cc c89 c99 c++ tcc *gcc* *g++* *clang* *cpp*)
  env -u CC -u CXX PATH="$own/bin" "$@"
}

elsewhere() {
  local long
  long=$own/$(printf 'long%.0s' {1..60})
  long=${long:0:200}
  mkdir "$long"
  localedef --inputfile=en_US --charmap=ISO-8859-1 "$own/en_US.ISO-8859-1" # Debian's package locales
  TMPDIR=$long LOCPATH=$own LC_ALL=en_US.ISO-8859-1 "$@"
}

nobody() {
  if [ "$(id -u)" != 0 ]; then
    "$@"
    return
  fi
  mkdir "$own/temporary"
  chown -R 65534:65534 "$own"
  # It reads all files, because Python may be in root's home, and writes none but its own. Triton needs a folder for its cache.
  HOME=/nonexistent USER=nobody TMPDIR="$own/temporary" TRITON_HOME="$own/temporary" setpriv --reuid=65534 --regid=65534 --clear-groups \
    --inh-caps=+dac_read_search --ambient-caps=+dac_read_search "$@"
}

case $machine in
avx2 | avx512)
  if without_avx512; then
    echo "tests/machines/run.sh $machine: this processor has no AVX-512, so the tests as on this machine (make test) are its run. Not run again: $*"
    exit 0
  fi
  ;;
esac
"$machine" "$@"
