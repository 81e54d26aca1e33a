# a PV guest's blkfront on xen-blkback, the peer: O_DIRECT data read back, and found in the image
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
n=0
until [ -b /dev/xvda ]; do
    n=$((n + 1))
    [ "$n" -lt 150 ] || { dmesg | tail -n 20; exit 1; }
    usleep 200000
done
echo "@guest sectors $(cat /sys/block/xvda/size)"
dd if=/dev/urandom of=/tmp/written bs=64k count=64 2> /dev/null
dd if=/tmp/written of=/dev/xvda bs=64k seek=3 oflag=direct 2> /dev/null
dd if=/dev/xvda of=/tmp/read bs=64k skip=3 count=64 iflag=direct 2> /dev/null
cmp /tmp/written /tmp/read
echo "@guest sha256 $(sha256sum < /tmp/written | cut -d ' ' -f 1)"
GUEST

truncate -s 32M disk.raw
loop=$(losetup -f)
losetup "$loop" disk.raw
trap 'losetup -d "$loop"' EXIT

guest_create peer guest.sh "disk = [ 'phy:$loop,xvda,w' ]"
guest_run peer 200 || fail "the guest's script"

guest_log peer | grep -q '^@guest sectors 65536$' || fail "the disk has another size"
sync
in_guest=$(guest_log peer | sed -n 's/^@guest sha256 //p')
in_dom0=$(hash_of disk.raw 64k 3 64)
echo "sha256 in the guest $in_guest, in dom0 $in_dom0"
[ -n "$in_guest" ] && [ "$in_guest" = "$in_dom0" ] || fail "the image has other data than the guest wrote"
