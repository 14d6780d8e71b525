#!/bin/sh
# `make setup` installs this file as .venv/bin/dvc. DVC's dependencies break Dagster's (pyproject.toml says how), so
# DVC has an environment of its own, and this launcher is the one way to it: with the project's commands first on PATH,
# because the stages of dvc.yaml call `dod`.
set -eu

file=$0
while [ -L "$file" ]; do
    target=$(readlink -- "$file")
    case $target in
        /*) file=$target ;;
        *) file=$(dirname -- "$file")/$target ;;
    esac
done
bin=$(CDPATH='' cd -- "$(dirname -- "$file")" && pwd)
root=$(CDPATH='' cd -- "$bin/../.." && pwd)
dvc=$root/.venv-dvc/bin/dvc

if [ ! -x "$dvc" ]; then
    echo "dvc: $dvc is missing; run \`make setup\` in $root" >&2
    exit 127     # not 1, by which `dvc status -q` says that something has changed
fi
export DVC_NO_ANALYTICS=1 PATH="$bin:$PATH"
exec "$dvc" "$@"
