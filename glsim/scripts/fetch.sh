# shellcheck shell=bash
# Sourced by the scripts beside it.

# fetch URL FILE [MD5]: downloads the whole file or none; what has arrived is taken up again by the next call.
fetch() {
    local url=$1 file=$2 md5=${3:-}
    if [[ -e $file ]]; then
        echo "$file is there"
        return
    fi
    mkdir -p "$(dirname "$file")"
    if ! curl -fL --retry 3 --connect-timeout 30 -C - -o "$file.part" "$url"; then
        echo "error: could not download $url: run again with a connection (what has arrived is kept as $file.part;" \
            "remove it to begin anew), or fetch the file by hand and put it at $file" >&2
        return 1
    fi
    if [[ -n $md5 ]] && ! md5sum --check --status <<<"$md5  $file.part"; then
        rm "$file.part"
        echo "error: what came from $url does not have the md5 $md5 and was deleted: run again" >&2
        return 1
    fi
    mv "$file.part" "$file"
}
