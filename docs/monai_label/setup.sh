#!/usr/bin/env bash
# MONAI Label in an environment of its own, and its app folder with this bundle in it. From anywhere:
#
#   bash docs/monai_label/setup.sh /path/to/new/venv /path/to/apps
#
# Started again, it makes only what is missing. PYTHON names another interpreter than python3.

set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: $0 VENV APPS" >&2
    exit 2
fi
bundle="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="$1"
apps="$2"
python="$venv/bin/python"

[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
if ! "$python" -m pip show --quiet monailabel 2> /dev/null; then
    # torch and torchvision must be a pair; pydicom-seg asks for numpy below 2 and, without saying so, for pydicom
    # below 3; MONAI's Spacingd from 1.6 on fails on the key `image_path`, which MONAI Label puts beside every image.
    grep -v -e '^torch==' -e '^numpy==' -e '^monai==' -e '^pytorch-ignite==' "$bundle/requirements.txt" \
        > "$venv/bundle_requirements.txt"
    "$python" -m pip install -r "$venv/bundle_requirements.txt" \
        torch==2.14.1 torchvision==0.29.1 monai==1.5.2 'numpy<2' \
        monailabel==0.8.5 'pydicom<3' 'pynetdicom<3' 'dicomweb-client<0.60'
fi
# The bundle needs the newer Ignite, and MONAI 1.5 asks for 0.4.11: a call of its own, so that pip takes both.
"$python" -m pip install --quiet --no-deps "$(grep '^pytorch-ignite==' "$bundle/requirements.txt")"

if [ ! -d "$apps/monaibundle" ]; then
    mkdir -p "$apps"
    "$python" -m monailabel.main apps --download --name monaibundle --output "$apps"
fi
mkdir -p "$apps/monaibundle/model"
# The name decides what MONAI Label takes the bundle for, and the checkout may be called otherwise.
ln -sfn "$bundle" "$apps/monaibundle/model/brain_t1_vae"

echo "start the server with:"
echo "$python -m monailabel.main start_server --app $apps/monaibundle --studies STUDIES" \
    "--conf models brain_t1_vae --conf zoo_source local --conf sam2 false --host 127.0.0.1 --port 8000"
