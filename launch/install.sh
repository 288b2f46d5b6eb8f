# Sourced by quickstart.sh, test.sh and worker.sh: makes or updates .venv with the package and the extras in $EXTRAS.
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "moe_reduce needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version). Set PYTHON=/path/to/python3.11" >&2
  exit 2
}
[[ -x "$ROOT/.venv/bin/python" ]] || "$PYTHON" -m venv "$ROOT/.venv"
stamp="$ROOT/.venv/installed$EXTRAS"
if [[ ! -f "$stamp" || "$ROOT/setup.py" -nt "$stamp" ]]; then
  case "$EXTRAS" in
    "[test]")
      echo "The extra test takes torch. On Linux pip takes a CUDA build unless told otherwise, and .venv grows to 6.7 GB;"
      echo "2.2 GB with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, less with ./launch/test.sh --no-peers"
      ;;
    "[test-core]") echo "The package, its libraries and the test tools take about 1.6 GB." ;;
    *) echo "The package and its libraries take about 1.2 GB." ;;
  esac
  echo "Installing into .venv (a few minutes the first time) ..."
  "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$ROOT$EXTRAS"
  touch "$stamp"
fi
