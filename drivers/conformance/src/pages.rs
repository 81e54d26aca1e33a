//! Named pages outside the process.

use crate::{OrFail, Outcome, Place, Test, holds, pattern, same, same_bytes, tests};
use tap_host::{Errno, PAGE_BYTES, SharedPage, SharedPages};

/// All bodies. Pages are named after the place's folder.
pub fn all<H: SharedPages>() -> Vec<Test<Place<H>>> {
    tests![
        a_new_page_is_zeros,
        a_page_takes_any_bytes,
        a_page_takes_numbers,
        two_opens_are_one_page,
        clones_are_one_page,
        a_page_stays_when_nobody_has_it_open,
        a_removed_page_begins_anew,
        a_removed_page_lives_while_it_is_open,
        a_missing_page_is_removed,
        pages_do_not_mix,
        a_page_has_one_owner,
        a_removed_page_is_owned_no_more,
        pages_are_listed,
    ]
}

/// A page's name, unique to the place.
fn name<H>(place: &Place<H>, name: &str) -> String {
    format!("conformance-{}-{name}", place.folder.rsplit('/').next().unwrap_or_default())
}

fn open<H: SharedPages>(place: &Place<H>, page: &str) -> Result<H::Region, String> {
    place.host.region(&name(place, page)).or_fail("open a page")
}

/// Removes what a body made.
fn remove<H: SharedPages>(place: &Place<H>, pages: &[&str]) {
    pages.iter().for_each(|page| place.host.remove_region(&name(place, page)));
}

fn content(page: &impl SharedPage) -> Vec<u8> {
    let mut bytes = vec![0xee; PAGE_BYTES];
    page.copy_in(0, &mut bytes);
    bytes
}

/// Copies of all alignments, checked through another view of the same page.
pub(crate) fn bytes_come_back(page: &impl SharedPage, other: &impl SharedPage) -> Outcome {
    let mut want = pattern(1, PAGE_BYTES);
    page.copy_out(0, &want);
    let lens = [0, 1, 2, 3, 5, 8, 13, 64, 511, 512, 1000];
    for (i, offset) in [0, 1, 2, 3, 4, 7, 9, 63, 1021, 2048, 3096].into_iter().enumerate() {
        for len in lens {
            let bytes = pattern((i * 16 + len) as u8, len);
            page.copy_out(offset, &bytes);
            want[offset..offset + len].copy_from_slice(&bytes);
            let mut got = vec![0xee; len];
            other.copy_in(offset, &mut got);
            same_bytes(&format!("{len} bytes at {offset}"), &got, &bytes)?;
        }
    }
    page.copy_out(PAGE_BYTES - 1, &[0x77]);
    want[PAGE_BYTES - 1] = 0x77;
    same_bytes("the whole page", &content(other), &want)
}

/// Numbers against bytes, stored through one view and read through another.
pub(crate) fn numbers_are_little_endian(page: &impl SharedPage, other: &impl SharedPage) -> Outcome {
    for offset in [0, 4, 8, 2044, 4092] {
        page.store_u32(offset, 0x0403_0201);
        page.full_barrier();
        let mut bytes = [0; 4];
        other.copy_in(offset, &mut bytes);
        same("bytes of a number", bytes, [1, 2, 3, 4])?;
        page.copy_out(offset, &[0xfc, 0xfd, 0xfe, 0xff]);
        page.full_barrier();
        same("number of bytes", other.load_u32(offset), 0xfffe_fdfc)?;
    }
    Ok(())
}

async fn a_new_page_is_zeros<H: SharedPages>(place: Place<H>) -> Outcome {
    let page = open(&place, "a")?;
    same_bytes("a new page", &content(&page), &[0; PAGE_BYTES])?;
    remove(&place, &["a"]);
    Ok(())
}

async fn a_page_takes_any_bytes<H: SharedPages>(place: Place<H>) -> Outcome {
    let (page, other) = (open(&place, "a")?, open(&place, "a")?);
    bytes_come_back(&page, &page)?;
    bytes_come_back(&page, &other)?;
    remove(&place, &["a"]);
    Ok(())
}

async fn a_page_takes_numbers<H: SharedPages>(place: Place<H>) -> Outcome {
    let (page, other) = (open(&place, "a")?, open(&place, "a")?);
    numbers_are_little_endian(&page, &page)?;
    numbers_are_little_endian(&page, &other)?;
    remove(&place, &["a"]);
    Ok(())
}

async fn two_opens_are_one_page<H: SharedPages>(place: Place<H>) -> Outcome {
    let (first, second) = (open(&place, "a")?, open(&place, "a")?);
    first.store_u32(0, 1);
    second.store_u32(4, 2);
    same("both numbers", (second.load_u32(0), first.load_u32(4)), (1, 2))?;
    drop(first);
    second.store_u32(8, 3);
    same("a third, opened again", open(&place, "a")?.load_u32(8), 3)?;
    remove(&place, &["a"]);
    Ok(())
}

async fn clones_are_one_page<H: SharedPages>(place: Place<H>) -> Outcome {
    let page = open(&place, "a")?;
    let clone = page.clone();
    page.store_u32(0, 1);
    drop(page);
    same("through the clone", clone.load_u32(0), 1)?;
    remove(&place, &["a"]);
    Ok(())
}

async fn a_page_stays_when_nobody_has_it_open<H: SharedPages>(place: Place<H>) -> Outcome {
    let page = open(&place, "a")?;
    page.copy_out(0, &pattern(2, PAGE_BYTES));
    drop(page);
    same_bytes("the page opened again", &content(&open(&place, "a")?), &pattern(2, PAGE_BYTES))?;
    remove(&place, &["a"]);
    Ok(())
}

async fn a_removed_page_begins_anew<H: SharedPages>(place: Place<H>) -> Outcome {
    for _ in 0..3 {
        let page = open(&place, "a")?;
        same_bytes("a page that was removed", &content(&page), &[0; PAGE_BYTES])?;
        page.copy_out(0, &pattern(3, PAGE_BYTES));
        drop(page);
        remove(&place, &["a"]);
    }
    Ok(())
}

async fn a_removed_page_lives_while_it_is_open<H: SharedPages>(place: Place<H>) -> Outcome {
    let old = open(&place, "a")?;
    old.copy_out(0, &pattern(4, PAGE_BYTES));
    remove(&place, &["a"]);
    same_bytes("the page without a name", &content(&old), &pattern(4, PAGE_BYTES))?;
    old.store_u32(0, 5);
    let new = open(&place, "a")?;
    same("a number in the new page", new.load_u32(0), 0)?;
    new.store_u32(0, 6);
    same("a number in the old page", old.load_u32(0), 5)?;
    remove(&place, &["a"]);
    Ok(())
}

async fn a_missing_page_is_removed<H: SharedPages>(place: Place<H>) -> Outcome {
    remove(&place, &["a", "a"]);
    let page = open(&place, "a")?;
    remove(&place, &["b"]);
    page.store_u32(0, 1);
    same("a page of another name", open(&place, "a")?.load_u32(0), 1)?;
    remove(&place, &["a", "a"]);
    Ok(())
}

fn own<H: SharedPages>(place: &Place<H>, page: &str) -> Result<H::Region, Errno> {
    place.host.own_region(&name(place, page))
}

async fn a_page_has_one_owner<H: SharedPages>(place: Place<H>) -> Outcome {
    let page = own(&place, "a").or_fail("own a page")?;
    same("owned twice", own(&place, "a").err(), Some(Errno::EBUSY))?;
    own(&place, "b").or_fail("own another page")?;
    page.store_u32(0, 1);
    same("seen through a page opened without ownership", open(&place, "a")?.load_u32(0), 1)?;
    let clone = page.clone();
    drop(page);
    same("owned by the clone", own(&place, "a").err(), Some(Errno::EBUSY))?;
    drop(clone);
    same("the next owner's", own(&place, "a").or_fail("own a page again")?.load_u32(0), 1)?;
    remove(&place, &["a", "b"]);
    Ok(())
}

async fn a_removed_page_is_owned_no_more<H: SharedPages>(place: Place<H>) -> Outcome {
    let old = own(&place, "a").or_fail("own a page")?;
    remove(&place, &["a"]);
    let new = own(&place, "a").or_fail("own a page of the name that was removed")?;
    drop(old);
    same("owned after the old one is gone", own(&place, "a").err(), Some(Errno::EBUSY))?;
    drop(new);
    remove(&place, &["a"]);
    Ok(())
}

async fn pages_do_not_mix<H: SharedPages>(place: Place<H>) -> Outcome {
    let names = ["a", "b", "aa", "a-b", "A"];
    let mut pages = Vec::new();
    for (i, name) in (1..).zip(names) {
        let page = open(&place, name)?;
        page.store_u32(0, i);
        pages.push(page);
    }
    let seen: Vec<u32> = pages.iter().map(|page| page.load_u32(0)).collect();
    holds("each page has its own number", seen == [1, 2, 3, 4, 5])?;
    remove(&place, &["b"]);
    let again: Vec<u32> =
        names.map(|name| open(&place, name).map(|page| page.load_u32(0)).unwrap_or(99)).to_vec();
    remove(&place, &names);
    holds("only the removed one is new", again == [1, 0, 3, 4, 5])
}

async fn pages_are_listed<H: SharedPages>(place: Place<H>) -> Outcome {
    let own = ["b", "a", "c"].map(|page| name(&place, page));
    let listed = || -> Result<Vec<String>, String> {
        let mut names = place.host.region_names().or_fail("list the pages")?;
        holds("the names are sorted", names.is_sorted())?;
        names.retain(|name| own.contains(name));
        Ok(names)
    };
    same("before", &listed()?, &Vec::new())?;
    let (first, second) = (open(&place, "b")?, open(&place, "a")?);
    drop(first);
    same("opened ones", &listed()?, &vec![own[1].clone(), own[0].clone()])?;
    remove(&place, &["a"]);
    same("one that is removed and still open", &listed()?, &vec![own[0].clone()])?;
    drop(second);
    remove(&place, &["b"]);
    same("after", &listed()?, &Vec::new())
}
