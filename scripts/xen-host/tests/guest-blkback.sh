# a PV guest's blkfront on xen-blkback, the peer: O_DIRECT data read back, a file system, the image as the guest saw it
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk_write_read xvda
disk_new_fs xvda
disk_hash xvda
GUEST

truncate -s 32M disk.raw
loop=$(losetup -f)
losetup "$loop" disk.raw
trap 'losetup -d "$loop"' EXIT
blkback on

guest_create peer guest.sh "disk = [ 'phy:$loop,xvda,w' ]"
guest_run peer 200 || fail "the guest's script"

guest_said peer '^@guest sectors of xvda: 65536$' || fail "the disk has another size"
sync
in_guest=$(guest_hash peer xvda)
in_dom0=$(hash_of disk.raw)
echo "sha256 in the guest $in_guest, in dom0 $in_dom0"
[ -n "$in_guest" ] && [ "$in_guest" = "$in_dom0" ] || fail "the image has other data than the guest wrote"
e2fsck -fn disk.raw
