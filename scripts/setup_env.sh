# Sourced by the two set-up commands: makes .venv at the project's root and installs the pinned versions once.
#
#   PYTHON=python3.12     which interpreter makes .venv (default: python3; 3.11 or newer)
#   DSFT_TORCH=cpu|cuda   which build of torch (default: cuda where nvidia-smi lists a GPU, else cpu)
#
# Usage: setup_env requirements.txt [more requirement files]

# What an environment with these requirement files has in .venv/installed.txt, as a line.
environment_stamp() {
    cat setup.py "$@" | sha256sum | cut -d' ' -f1
}

setup_env() {
    local root python torch_build stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || return 1
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $python is missing or older than Python 3.11; name another with PYTHON=…" >&2
        return 1
    fi
    torch_build=${DSFT_TORCH:-$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)}
    if [ ! -f "requirements-$torch_build.txt" ]; then
        echo "error: DSFT_TORCH must be cpu or cuda, got $torch_build" >&2
        return 1
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "== making .venv with $("$python" --version)"
        "$python" -m venv .venv || return 1
    fi
    stamp=.venv/installed.txt
    wanted=$(environment_stamp "requirements-$torch_build.txt" "$@")
    if ! grep -qsx "$wanted" "$stamp"; then
        echo "== installing the pinned requirements ($torch_build build of torch); this can take some minutes"
        # torch first and by its exact version: any other order lets a package choose another build. The other files
        # list all packages, so none is resolved; of trl, whose chat templates the tests read, none is wanted.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "requirements-$torch_build.txt" &&
            .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "${@/#/-r}" &&
            .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || return 1
        echo "$wanted" >>"$stamp"
    fi
    echo "== getting the embedded model"
    PATH="$root/.venv/bin:$PATH"
    export PATH
    python -m dsft.model.embedded >/dev/null || return 1
}
