//! Grants: pages of another domain, mapped and copied.

use crate::pages::{bytes_come_back, numbers_are_little_endian};
use crate::pair::{Pair, Peer, XenHost};
use crate::{OrFail, Outcome, Test, pattern, same, same_bytes, tests, until};
use tap_host::{DomId, Errno, GrantRef, GrantSegment, PAGE_BYTES, SharedPage};

/// All bodies.
pub fn all<H: XenHost, P: Peer>() -> Vec<Test<Pair<H, P>>> {
    tests![
        a_granted_page_is_shared_both_ways,
        a_granted_page_takes_any_bytes_and_numbers,
        a_grant_is_mapped_as_often_as_asked,
        many_grants_are_mapped_at_once,
        a_mapping_lives_until_its_last_clone,
        a_mapping_outlives_its_grant,
        a_missing_grant_is_refused,
        a_grant_for_another_domain_is_refused,
        an_ended_grant_is_refused,
        a_read_only_grant_is_mapped_for_reading_only,
        a_writable_grant_is_mapped_for_reading_as_well,
        copies_take_segments_in_their_order,
        copies_put_segments_in_their_order,
        copies_of_many_segments_are_whole,
        copies_of_nothing_succeed,
        copies_and_mappings_are_of_one_page,
        one_bad_segment_fails_a_copy,
        a_read_only_grant_is_copied_from_only,
    ]
}

fn segment(gref: GrantRef, offset: usize, len: usize) -> GrantSegment {
    GrantSegment { gref, offset: offset as u16, len: len as u16 }
}

fn content(page: &impl SharedPage) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    page.copy_in(0, &mut bytes);
    bytes
}

/// Fails unless the host can neither map nor copy this.
fn refused<H: XenHost, P: Peer>(pair: &Pair<H, P>, dom: DomId, gref: GrantRef) -> Outcome {
    let (host, segment) = (&pair.host, segment(gref, 0, 512));
    for write in [false, true] {
        same(&format!("map {gref} of {dom}"), host.map(dom, gref, write).err(), Some(Errno::EINVAL))?;
    }
    let copied = host.copy_in(dom, &[segment], &mut [0; 512]);
    same(&format!("copy in from {gref} of {dom}"), copied, Err(Errno::EINVAL))?;
    let copied = host.copy_out(dom, &[segment], &[0; 512]);
    same(&format!("copy out to {gref} of {dom}"), copied, Err(Errno::EINVAL))
}

/// Ends a grant that is not mapped.
async fn end<H: XenHost, P: Peer>(pair: &Pair<H, P>, gref: GrantRef) -> Outcome {
    pair.peer.end_access(gref).or_fail("end a grant that is not mapped")?;
    gone(pair, gref).await
}

/// Waits until a grant that was ended can no longer be used.
async fn gone<H: XenHost, P: Peer>(pair: &Pair<H, P>, gref: GrantRef) -> Outcome {
    let dom = pair.peer.dom();
    until(&pair.host, "the end of a grant", || pair.host.map(dom, gref, false).is_err()).await?;
    refused(pair, dom, gref)
}

async fn a_granted_page_is_shared_both_ways<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    far.copy_out(0, &pattern(1, PAGE_BYTES));
    let near = pair.map(gref, true)?;
    same_bytes("what the peer stored before", &content(&near), &pattern(1, PAGE_BYTES))?;
    near.copy_out(0, &pattern(2, PAGE_BYTES));
    same_bytes("what the host stored", &content(&far), &pattern(2, PAGE_BYTES))?;
    far.store_u32(4092, 77);
    same("what the peer stored since", near.load_u32(4092), 77)
}

async fn a_granted_page_takes_any_bytes_and_numbers<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    let near = pair.map(gref, true)?;
    bytes_come_back(&near, &near)?;
    bytes_come_back(&near, &far)?;
    bytes_come_back(&far, &near)?;
    numbers_are_little_endian(&near, &far)?;
    numbers_are_little_endian(&far, &near)
}

async fn a_grant_is_mapped_as_often_as_asked<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    let (first, second) = (pair.map(gref, true)?, pair.map(gref, true)?);
    first.store_u32(0, 1);
    same("through the second mapping", second.load_u32(0), 1)?;
    drop(first);
    second.store_u32(0, 2);
    same("after the first has gone", far.load_u32(0), 2)?;
    let third = pair.map(gref, false)?;
    same("through a third", third.load_u32(0), 2)?;
    drop((second, third, far));
    end(&pair, gref).await
}

async fn many_grants_are_mapped_at_once<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let mut pages = Vec::new();
    for i in 0..64 {
        let (gref, far) = pair.grant(true)?;
        far.store_u32(0, i);
        pages.push((i, far, pair.map(gref, true)?));
    }
    for (i, _, near) in &pages {
        same("what a peer's page has", near.load_u32(0), *i)?;
        near.store_u32(4, i + 100);
    }
    pages.iter().try_for_each(|(i, far, _)| same("what a page got", far.load_u32(4), i + 100))
}

async fn a_mapping_lives_until_its_last_clone<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    let near = pair.map(gref, true)?;
    let clone = near.clone();
    drop(near);
    clone.store_u32(8, 5);
    same("through the clone that is left", far.load_u32(8), 5)?;
    drop((clone, far));
    end(&pair, gref).await
}

async fn a_mapping_outlives_its_grant<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    far.copy_out(0, &pattern(3, PAGE_BYTES));
    let near = pair.map(gref, true)?;
    drop(far);
    // A peer may or may not be told that the page is in use.
    let ended = pair.peer.end_access(gref);
    if ended.is_err() {
        same("end a grant that is mapped", ended, Err(Errno::EBUSY))?;
    }
    same_bytes("the page of a grant that was ended", &content(&near), &pattern(3, PAGE_BYTES))?;
    near.store_u32(0, 9);
    same("a number in it", near.load_u32(0), 9)?;
    drop(near);
    if ended.is_err() { end(&pair, gref).await } else { gone(&pair, gref).await }
}

async fn a_missing_grant_is_refused<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    for gref in [1 << 20, u32::MAX] {
        refused(&pair, pair.peer.dom(), GrantRef(gref))?;
    }
    let (gref, _far) = pair.grant(true)?;
    refused(&pair, pair.stranger, gref)
}

async fn a_grant_for_another_domain_is_refused<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.peer.grant(pair.stranger, true).or_fail("grant a page to a stranger")?;
    refused(&pair, pair.peer.dom(), gref)?;
    same_bytes("the page", &content(&far), &[0; PAGE_BYTES])
}

async fn an_ended_grant_is_refused<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    drop(far);
    end(&pair, gref).await
}

async fn a_read_only_grant_is_mapped_for_reading_only<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(false)?;
    let dom = pair.peer.dom();
    same("map it for writing", pair.host.map(dom, gref, true).err(), Some(Errno::EINVAL))?;
    let near = pair.map(gref, false)?;
    far.copy_out(0, &pattern(4, PAGE_BYTES));
    same_bytes("what is read", &content(&near), &pattern(4, PAGE_BYTES))
}

async fn a_writable_grant_is_mapped_for_reading_as_well<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    let (reader, writer) = (pair.map(gref, false)?, pair.map(gref, true)?);
    far.store_u32(0, 1);
    writer.store_u32(4, 2);
    same("what the reader sees", (reader.load_u32(0), reader.load_u32(4)), (1, 2))
}

/// Parts of two pages: whole ones, single bytes at the borders, one twice.
const PARTS: [(usize, usize, usize); 7] =
    [(0, 512, 1024), (1, 0, PAGE_BYTES), (0, 4095, 1), (0, 0, 1), (1, 3, 7), (1, 3584, 512), (0, 512, 9)];

async fn copies_take_segments_in_their_order<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let pages = [pair.grant(true)?, pair.grant(false)?];
    let bytes = [pattern(1, PAGE_BYTES), pattern(2, PAGE_BYTES)];
    pages.iter().zip(&bytes).for_each(|((_, far), bytes)| far.copy_out(0, bytes));
    let segments = PARTS.map(|(page, offset, len)| segment(pages[page].0, offset, len));
    let want: Vec<u8> =
        PARTS.iter().flat_map(|&(page, offset, len)| bytes[page][offset..offset + len].to_vec()).collect();
    let mut got = vec![0xee; want.len()];
    pair.host.copy_in(pair.peer.dom(), &segments, &mut got).or_fail("copy in")?;
    same_bytes("what was copied", &got, &want)
}

async fn copies_put_segments_in_their_order<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let pages = [pair.grant(true)?, pair.grant(true)?];
    let mut want = [pattern(1, PAGE_BYTES), pattern(2, PAGE_BYTES)];
    pages.iter().zip(&want).for_each(|((_, far), bytes)| far.copy_out(0, bytes));
    // Without the first page's last part, which overlaps another: the order between them is not promised.
    let parts = [(0, 512, 1024), (1, 0, 3), (1, 10, 4086), (0, 4095, 1), (0, 0, 1)];
    let segments = parts.map(|(page, offset, len)| segment(pages[page].0, offset, len));
    let private = pattern(9, parts.iter().map(|(_, _, len)| len).sum());
    let mut rest = &private[..];
    for (page, offset, len) in parts {
        let (now, later) = rest.split_at(len);
        want[page][offset..offset + len].copy_from_slice(now);
        rest = later;
    }
    pair.host.copy_out(pair.peer.dom(), &segments, &private).or_fail("copy out")?;
    same_bytes("the first page", &content(&pages[0].1), &want[0])?;
    same_bytes("the second page", &content(&pages[1].1), &want[1])
}

async fn copies_of_many_segments_are_whole<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    far.copy_out(0, &pattern(5, PAGE_BYTES));
    // More than any system call takes at once, from the end to the start.
    let segments: Vec<_> = (0..512).rev().map(|i| segment(gref, i * 8, 8)).collect();
    let reversed = |bytes: &[u8]| bytes.chunks(8).rev().flatten().copied().collect::<Vec<u8>>();
    let mut got = vec![0; PAGE_BYTES];
    pair.host.copy_in(pair.peer.dom(), &segments, &mut got).or_fail("copy in")?;
    same_bytes("what was copied in", &got, &reversed(&pattern(5, PAGE_BYTES)))?;
    pair.host.copy_out(pair.peer.dom(), &segments, &pattern(6, PAGE_BYTES)).or_fail("copy out")?;
    same_bytes("what was copied out", &content(&far), &reversed(&pattern(6, PAGE_BYTES)))
}

async fn copies_of_nothing_succeed<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let dom = pair.peer.dom();
    let (gref, far) = pair.grant(true)?;
    far.copy_out(0, &pattern(1, PAGE_BYTES));
    pair.host.copy_in(dom, &[], &mut []).or_fail("copy no segment in")?;
    pair.host.copy_out(dom, &[], &[]).or_fail("copy no segment out")?;
    pair.host.copy_out(dom, &[segment(gref, 0, 0)], &[]).or_fail("copy no byte out")?;
    let mut got = [0; 4];
    let parts = [segment(gref, 8, 2), segment(gref, 99, 0), segment(gref, 20, 2)];
    pair.host.copy_in(dom, &parts, &mut got).or_fail("copy in with no bytes between")?;
    let page = pattern(1, PAGE_BYTES);
    same_bytes("what was copied", &got, &[page[8], page[9], page[20], page[21]])?;
    same_bytes("the page", &content(&far), &page)
}

async fn copies_and_mappings_are_of_one_page<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, _far) = pair.grant(true)?;
    let near = pair.map(gref, true)?;
    let dom = pair.peer.dom();
    pair.host.copy_out(dom, &[segment(gref, 16, 100)], &pattern(1, 100)).or_fail("copy out")?;
    let mut got = [0; 100];
    near.copy_in(16, &mut got);
    same_bytes("a copy in the mapping", &got, &pattern(1, 100))?;
    near.store_u32(16, 7);
    pair.host.copy_in(dom, &[segment(gref, 16, 4)], &mut got[..4]).or_fail("copy in")?;
    same_bytes("a store in a copy", &got[..4], &[7, 0, 0, 0])
}

async fn one_bad_segment_fails_a_copy<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(true)?;
    for bad in 0..3 {
        let mut segments = [segment(gref, 0, 512), segment(gref, 512, 512), segment(gref, 1024, 512)];
        segments[bad].gref = GrantRef(1 << 20);
        let (dom, host) = (pair.peer.dom(), &pair.host);
        same("copy in", host.copy_in(dom, &segments, &mut [0; 1536]), Err(Errno::EINVAL))?;
        same("copy out", host.copy_out(dom, &segments, &[1; 1536]), Err(Errno::EINVAL))?;
    }
    same_bytes("bytes outside all segments", &content(&far)[1536..], &[0; PAGE_BYTES - 1536])
}

async fn a_read_only_grant_is_copied_from_only<H: XenHost, P: Peer>(pair: Pair<H, P>) -> Outcome {
    let (gref, far) = pair.grant(false)?;
    far.copy_out(0, &pattern(7, PAGE_BYTES));
    let (dom, parts) = (pair.peer.dom(), [segment(gref, 100, 200)]);
    let mut got = [0; 200];
    pair.host.copy_in(dom, &parts, &mut got).or_fail("copy in")?;
    same_bytes("what was copied", &got, &pattern(7, PAGE_BYTES)[100..300])?;
    same("copy out", pair.host.copy_out(dom, &parts, &[1; 200]), Err(Errno::EINVAL))?;
    same_bytes("the page", &content(&far), &pattern(7, PAGE_BYTES))
}
