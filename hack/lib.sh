# What hack/demo and hack/test share: packages, the virtual environment, tools written in Go. Sourced, not run.
# shellcheck shell=bash disable=SC2034

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$repo/.cache
venv=$cache/venv

# sudo may leave out where administrators' programs and Go are
PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/go/bin
HOME=${HOME:-/root}
PYTHONPYCACHEPREFIX=$cache/pycache # root's bytecode stays out of the checkout
export PATH HOME PYTHONPYCACHEPREFIX

say() { printf '== %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

need_root() { [ "$(id -u)" -eq 0 ] || die "run it as root: sudo $0"; }

# has PROBE...: whether one of them is there: a command on PATH, or an absolute path
has() {
  local probe
  for probe; do
    if [[ $probe == /* ]]; then [ -e "$probe" ]; else command -v "$probe" >/dev/null; fi && return
  done
  return 1
}

# install_packages "PACKAGE PROBE..." ...: install those of which no probe is there
install_packages() {
  local item package probes missing=()
  for item; do
    read -r package probes <<<"$item"
    # shellcheck disable=SC2086 # probes are words
    has $probes || missing+=("$package")
  done
  find_python >/dev/null || missing+=(python3 python3-venv)
  [ ${#missing[@]} -eq 0 ] || apt_install "${missing[@]}"
}

# What is installed already is left alone: --no-remove makes apt-get refuse a package that would replace some.
apt_install() {
  command -v apt-get >/dev/null || die "these are missing, and there is no apt-get to install them: $*"
  say "installing $*"
  mkdir -p "$cache"
  {
    apt-get -q -o DPkg::Lock::Timeout=300 update || say "the package lists may be old"
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
      install --no-install-recommends --no-remove "$@"
  } >"$cache/apt.log" 2>&1 </dev/null || {
    tail -n 20 "$cache/apt.log" >&2
    die "apt-get cannot install $*"
  }
  # its package starts a server on port 5000; the tests start their own
  if [[ " $* " == *" docker-registry "* && -d /run/systemd/system ]]; then
    systemctl --quiet disable --now docker-registry || say "docker-registry may be running now"
  fi
}

# find_python: the first Python that is new enough and can make virtual environments
find_python() {
  local name
  for name in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
    "$name" -P -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    echo "$name"
    return
  done
  return 1
}

# make_venv run|test: make .cache/venv, or leave it if it has what is asked for and works
make_venv() {
  mkdir -p "$cache"
  (
    flock 9
    local kind=$1 python stamp
    python=$(find_python) || die "there is no Python 3.11 or later that can make virtual environments"
    stamp=$({ "$python" -V && echo "$repo" && cat "$repo/pyproject.toml" "$repo/tests/requirements.txt"; } | sha256sum)
    venv_is "$kind" "$stamp" || fill_venv "$kind" "$python" "$stamp"
  ) 9>"$cache/lock"
}

# venv_is KIND STAMP: whether the environment was made for this, and still starts; one for tests can also run
venv_is() {
  local made
  made=$(cat "$venv/stamp" 2>/dev/null) || return
  [ "$made" = "$1 $2" ] || [ "$made" = "test $2" ] || return
  "$venv/bin/python" -P -c 'import crishim.cri.api.api_pb2_grpc, click, isal, msgspec, prometheus_client, urllib3' \
    2>/dev/null
}

fill_venv() {
  local kind=$1 python=$2 stamp=$3 pip=("$venv/bin/python" -P -m pip --disable-pip-version-check --quiet)
  say "making a virtual environment in $venv"
  rm -rf "$venv"
  "$python" -P -m venv "$venv"
  if [ "$kind" = test ]; then
    "${pip[@]}" install --requirement "$repo/tests/requirements.txt"
  fi
  "${pip[@]}" install --constraint "$repo/tests/requirements.txt" --editable "$repo"
  echo "$kind $stamp" >"$venv/stamp"
}

# build_crictl: crictl of the version in hack/tools/go.mod as .cache/bin/crictl
build_crictl() {
  local version target=$cache/bin/crictl
  version=$(sed -n 's/^require sigs.k8s.io\/cri-tools //p' "$repo/hack/tools/go.mod")
  [ "$("$target" --version 2>/dev/null)" != "crictl version $version" ] || return 0
  mkdir -p "$cache/bin"
  compile_crictl "$version" "$target" || download_crictl "$version" "$target" || die "cannot get crictl $version"
}

# In a copy, since -mod=mod writes to go.mod; the sums of all that is compiled are in go.sum.
compile_crictl() (
  command -v go >/dev/null || exit 1
  say "compiling crictl $1, which takes some minutes the first time"
  copy=$(mktemp -d)
  trap 'rm -rf "$copy"' EXIT
  cp "$repo"/hack/tools/go.{mod,sum} "$copy"
  cd "$copy" || exit 1
  GOFLAGS="${GOFLAGS:-} -mod=mod" go build -trimpath -o crictl \
    -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$1" sigs.k8s.io/cri-tools/cmd/crictl &&
    mv crictl "$2"
)

download_crictl() (
  case $(uname -m) in
    x86_64) machine=amd64 ;;
    aarch64) machine=arm64 ;;
    *) exit 1 ;;
  esac
  say "downloading crictl $1: there is no Go here that can compile it"
  has curl || apt_install curl ca-certificates
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  curl --fail --silent --show-error --location --output "$folder/crictl.tar.gz" \
    "https://github.com/kubernetes-sigs/cri-tools/releases/download/$1/crictl-$1-linux-$machine.tar.gz" &&
    tar -xzf "$folder/crictl.tar.gz" -C "$folder" crictl &&
    mv "$folder/crictl" "$2"
)

runtime_packages=(
  "runc runc"
  "conmon /usr/bin/conmon"
  "containernetworking-plugins /opt/cni/bin/bridge /usr/lib/cni/bridge"
  "catatonit /usr/bin/catatonit"
  "busybox busybox"
  "iptables iptables"
  "iproute2 ip"
)

test_packages=(
  "ca-certificates /etc/ssl/certs/ca-certificates.crt"
  "crun crun"
  "docker-registry docker-registry"
  "git git"
  "procps pgrep"
  "skopeo skopeo"
  "umoci umoci"
  "util-linux nsenter"
  "util-linux-extra ipcmk"
)
