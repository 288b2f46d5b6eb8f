# Sourced by quickstart.sh and test.sh: makes or updates .venv with the package and the extras named in $EXTRAS.
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "moe_reduce needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version). Set PYTHON=/path/to/python3.11" >&2
  exit 2
}
[[ -x "$ROOT/.venv/bin/python" ]] || "$PYTHON" -m venv "$ROOT/.venv"
stamp="$ROOT/.venv/installed$EXTRAS"
if [[ ! -f "$stamp" || "$ROOT/setup.py" -nt "$stamp" ]]; then
  echo "Installing into .venv (a few minutes the first time) ..."
  "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$ROOT$EXTRAS"
  touch "$stamp"
fi
