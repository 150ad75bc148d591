#!/usr/bin/env bash
# Trains on GKE: fills in launch/gke-jobset.yaml and applies it.
#
#   launch/gke.sh --name opo --exp opo_r1_distill_qwen_7b --image IMAGE \
#     --bucket my-bucket --accelerator tpu-v6e-slice --topology 8x8 --hosts 16 --chips 4 \
#     [--account default] [--dry-run] [-- ARGS]
#
# IMAGE contains this repository in /opo_jax, installed (`make install JAX_EXTRA=tpu`).
# Create the bucket with a hierarchical namespace (docs/scaling.md). Arguments after `--`
# are flags of the experiment: -- --steps 100. --dry-run prints the JobSet without
# applying it. To follow the run:
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME
set -euo pipefail

name="" exp="" image="" bucket="" accelerator="" topology="" hosts="" chips=""
account=default dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --name | --exp | --image | --bucket | --accelerator | --topology | --hosts | --chips | --account)
      [ $# -ge 2 ] || { echo "error: $1 needs a value." >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: $1 is not an option; see the head of this file." >&2; exit 2 ;;
  esac
done
here="$(cd "$(dirname "$0")" && pwd)"
jobset="$(<"$here/gke-jobset.yaml")"
for option in name exp image bucket accelerator topology hosts chips account; do
  [ -n "${!option}" ] || { echo "error: --$option is missing." >&2; exit 2; }
  jobset="${jobset//\{$option\}/${!option}}"
done
[ -f "$here/../experiments/$exp.py" ] \
  || { echo "error: there is no experiment $exp." >&2; exit 2; }
# Quoted for make's shell, then for YAML; filled in last, so that braces in them stay.
arguments=""
[ $# -eq 0 ] || printf -v arguments '%q ' "$@"
jobset="${jobset/"{arguments}"/"${arguments//"'"/"''"}"}"

if [ -n "$dry" ]; then
  printf '%s\n' "$jobset"
else
  printf '%s\n' "$jobset" | kubectl apply -f -
fi
