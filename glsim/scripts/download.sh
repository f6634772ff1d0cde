#!/usr/bin/env bash
# Downloads data sets to data/, where their configurations expect them; what is there already stays.
#     ./scripts/download.sh             those that may be fetched freely, and where the others are
#     ./scripts/download.sh cub pets    these alone (inat17, 186 GB, only so)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/fetch.sh

# archive URL MD5 MEMBER TARGET: downloads and unpacks an archive, of which MEMBER becomes data/TARGET.
archive() {
    local url=$1 md5=$2 member=$3 target=data/$4
    local file=data/${url##*/}
    if [[ -e $target ]]; then
        echo "$target is there"
        return
    fi
    fetch "$url" "$file" "$md5"
    rm -rf "$target.unpacking"
    mkdir -p "$target.unpacking"
    tar -xf "$file" -C "$target.unpacking"
    mv "$target.unpacking/$member" "$target"
    rm -rf "$target.unpacking" "$file"
}

aircraft() {
    archive https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz "" \
        fgvc-aircraft-2013b fgvc-aircraft-2013b
}

cub() {
    archive https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz 97eceeb196236b17998738112f37df78 \
        CUB_200_2011 CUB_200_2011
}

dogs() {
    local host=http://vision.stanford.edu/aditya86/ImageNetDogs list
    archive "$host/images.tar" "" Images dogs/Images
    for list in train_list.mat test_list.mat; do
        archive "$host/lists.tar" "" "$list" "dogs/$list"
    done
}

flowers() {
    local host=https://www.robots.ox.ac.uk/~vgg/data/flowers/102
    archive "$host/102flowers.tgz" 52808999861908f626f3c1f4e79d11fa jpg flowers-102/jpg
    fetch "$host/imagelabels.mat" data/flowers-102/imagelabels.mat e0620be6f572b9609742df49c70aed4d
    fetch "$host/setid.mat" data/flowers-102/setid.mat a5357ecc9cb78c4bef273ce3793fc85c
}

food() {
    archive http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz 85eeb15f3717b99a5da872d97d918f87 food-101 food-101
}

pets() {
    local host=https://www.robots.ox.ac.uk/~vgg/data/pets/data
    archive "$host/images.tar.gz" 5c4f3ee8e5d25df40f4fd59a7f44e54c images oxford-iiit-pet/images
    archive "$host/annotations.tar.gz" 95a8c909bbe2e81eed6a22bccdf3f68f annotations oxford-iiit-pet/annotations
}

inat17() {
    local host=https://ml-inat-competition-datasets.s3.amazonaws.com/2017
    archive "$host/train_val_images.tar.gz" 7c784ea5e424efaec655bd392f87301f train_val_images inat17/train_val_images
    fetch "$host/train_val2017.zip" data/inat17/train_val2017.zip
    unzip -joq data/inat17/train_val2017.zip '*.json' -d data/inat17
}

by_hand() {
    cat <<'TEXT'
By hand, below data/:
    cars       any copy of the original files (their host is gone)                    cars/cars_annos.mat, cars/car_ims/
    cotton     https://maxwell.ict.griffith.edu.au/cvipl/UFG_dataset.html             cotton/cotton_square_new/
    soy        the same page                                                          soy/soybean200_square/
    nabirds    https://dl.allaboutbirds.org/nabirds (a form)                          nabirds/
    inat17     ./scripts/download.sh inat17 (186 GB)                                  inat17/
    dafb       https://github.com/arkel23/animesion                                   dafb/data/<class>/<image>
    moe        https://www.kaggle.com/datasets/mylesoneill/tagged-anime-illustrations    moe/data/<class>/<image>
    vegfru     https://github.com/ustc-vim/vegfru                                     vegfru/data/<class>/<image>
    ncfm       https://www.kaggle.com/c/the-nature-conservancy-fisheries-monitoring   ncfm/data/<class>/<image>
    imagenet   https://image-net.org                                                  imagenet/{train,val}/<class>/<image>
    sketch     https://github.com/HaohanWang/ImageNet-Sketch                          sketch/sketch/<class>/<image>
TEXT
}

if [[ $# -eq 0 ]]; then
    by_hand
    set -- cub aircraft dogs flowers food pets
fi
for name in "$@"; do
    case $name in
        aircraft | cub | dogs | flowers | food | inat17 | pets) "$name" ;;
        *)
            echo "error: there is no download of $name: expected aircraft, cub, dogs, flowers, food, inat17 or pets" >&2
            by_hand >&2
            exit 1
            ;;
    esac
done
