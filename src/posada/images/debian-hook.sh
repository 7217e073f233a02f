# mmdebstrap's customize hook: $1 is the tree. Runs as the root of mmdebstrap's namespace, outside the tree.
# Adds the kernel's modules, makes the tree anonymous, and writes it to a disk. Each "I: posada:" line is progress.
set -eu
root=$1
work=$root/tmp/posada
mkdir "$work"

echo "I: posada: kernel" >&2
cd "$work"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
depends() { apt-cache depends --important "$1" | sed -n "s/^ *Depends: \\(linux-$2[^ ]*\\)\$/\\1/p"; }
# The plain name is a meta-package that depends on the kernel; since Debian 14 that one is but the sum of its parts.
package=$(depends "$POSADA_KERNEL_PACKAGE" image-)
parts=$(depends "${package:?there is no cloud kernel in this release}" '\(base\|binary\|modules\)-[0-9]')
# shellcheck disable=SC2086 # a list of names
apt-get --quiet download $package $parts >&2
unset APT_CONFIG

echo "I: posada: modules" >&2
mkdir kernel
for deb in ./*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar --extract --directory=kernel --no-same-owner
done
image=$(find kernel -name 'vmlinuz*' -type f)
cat "$image" > "$POSADA_KERNEL"
rm "$image"
modules=$(find kernel -path '*/lib/modules/*' -type d -prune -print)
version=${modules##*/}
mkdir -p "$root/lib/modules"
mv "$modules" "$root/lib/modules/"
cd /
rm -rf "$work"
chroot "$root" depmod "$version"
tar --create --file="$POSADA_MODULES" --directory="$root/lib/modules/$version" --sort=name .

# A tree that many machines will be: nothing of this host, no identity, no leftovers of the installation.
if [ -e "$root/sbin/start-stop-daemon.REAL" ]; then
    mv "$root/sbin/start-stop-daemon.REAL" "$root/sbin/start-stop-daemon"
fi
rm -rf "$root/usr/sbin/policy-rc.d" "$root"/etc/apt/apt.conf.d/??mmdebstrap \
    "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb \
    "$root/var/cache/ldconfig/aux-cache" "$root"/var/cache/debconf/*-old "$root"/etc/*- \
    "$root"/var/log/*.log "$root"/var/log/apt/* "$root/var/lib/dbus/machine-id" "$root/var/lib/systemd/random-seed" \
    "$root"/etc/ssh/ssh_host_*_key* "$root/etc/resolv.conf"
: > "$root/etc/machine-id"
echo posada > "$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n127.0.1.1\tposada\n::1\tlocalhost ip6-localhost ip6-loopback\n' > "$root/etc/hosts"
if [ -n "$POSADA_APT_CONF" ]; then
    printf '%s' "$POSADA_APT_CONF" > "$root/etc/apt/apt.conf.d/90posada"
fi

if [ -e "$root/usr/sbin/sshd" ]; then
    # Its host keys are gone, so that no two machines share them; each machine makes its own at the first start.
    mkdir -p "$root/etc/systemd/system/ssh.service.d"
    printf '[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n' \
        > "$root/etc/systemd/system/ssh.service.d/host-keys.conf"
fi

echo "I: posada: disk" >&2
# The features are named, and the host's mke2fs.conf ignored, so that the disk does not depend on the host's e2fsprogs and
# mounts in kernels since 4.4. Inode tables are holes of a sparse file: zero already, so that no guest spends its first minutes
# zeroing them. No reserved blocks, and a small journal: it is dirtied from end to end in every overlay.
write_disk='
    find "$1/run" "$1/tmp" -mindepth 1 -maxdepth 1 ! -name lock -exec rm -rf {} +
    features=has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super
    features=$features,large_file,huge_file,dir_nlink,extra_isize,metadata_csum
    MKE2FS_CONFIG=/dev/null "$POSADA_MKE2FS" -q -F -t ext4 -b 4096 -I 256 -i 16384 -m 0 -J size=16 -L root \
        -O "none,$features" \
        -E "lazy_itable_init=0,root_owner=0:0,hash_seed=$POSADA_UUID" -U "$POSADA_UUID" -d "$1" "$POSADA_DISK"
'
own_mounts="unshare --mount --propagation=$POSADA_PROPAGATION"
if $own_mounts true 2> /dev/null; then
    # A bind mount that is not recursive shows the tree without the proc, sys and dev that are mounted in it now.
    $own_mounts sh -euc 'mount --bind "$1" "$1/mnt"; sh -euc "$2" sh "$1/mnt"' sh "$root" "$write_disk" >&2
else
    # In a container whose root may not mount: then mmdebstrap could not either, and the tree is bare.
    sh -euc "$write_disk" sh "$root" >&2
fi
