//! Closes that are forced: clients are cut off, and storage that does not answer is not waited for.

use super::ControlledHost;
use super::settings::Settings;
use super::vbd::{Closing, Forced, Vbd};
use std::rc::Rc;
use tap_control::Refusal;
use tap_host::{Errno, unless};

tap_host::listed! {
    pub(super) BUGS: Bug;
    FORCED_CLOSE_DONE = "forced-close-done", "a forced close whose image is still in use counts as done";
}

impl<H: ControlledHost> Vbd<H> {
    /// Its close was forced, and somebody was told that it takes longer.
    pub(super) fn closes_late(&self) -> bool {
        self.forced.borrow().as_ref().is_some_and(|forced| forced.late.get())
    }

    /// Cuts its clients off at once, and has the image closed once the requests about the disk that came before are
    /// carried out, and those of its clients; these go on, because storage that has them may still do them. Waits for
    /// that only for a time.
    pub(super) async fn close_at_once(self: &Rc<Self>, settings: &Rc<Settings<H>>) -> Result<(), Refusal> {
        let name = self.open_image().unwrap_or_default();
        let forced = self.force(settings);
        if unless(settings.until_late(), forced.ended.wait()).await.is_some() {
            return forced.result.borrow().clone().unwrap_or(Ok(()));
        }
        forced.late.set(true);
        if settings.host.bug(&FORCED_CLOSE_DONE) {
            return Ok(());
        }
        let words = format!(
            "close minor {}: {name} is in use after {} s, because its storage does not answer; it is closed once that \
             does, and its clients are gone",
            self.minor(),
            settings.pause_limit_s()
        );
        Err(Refusal::new(Errno::ETIMEDOUT, words))
    }

    /// The forced close that is under way; begins one if there is none.
    fn force(self: &Rc<Self>, settings: &Rc<Settings<H>>) -> Rc<Forced> {
        if let Some(forced) = &*self.forced.borrow() {
            return Rc::clone(forced);
        }
        self.hang_up(&settings.host);
        let forced = Rc::<Forced>::default();
        *self.forced.borrow_mut() = Some(Rc::clone(&forced));
        let (own, all, under_way) = (Rc::clone(self), Rc::clone(settings), Rc::clone(&forced));
        settings.host.spawn("forced close", u64::from(self.minor()), async move {
            let _turn = own.turn.acquire().await;
            let result = own.close(&all, Closing::Forced).await;
            if under_way.late.get() {
                let text = result.as_ref().map_or_else(|why| why.words.as_str(), |()| "it is closed now");
                all.console.err(&format!("tapdisk: minor {}, whose close was forced: {text}", own.minor()));
            }
            own.forced.take();
            *under_way.result.borrow_mut() = Some(result);
            under_way.ended.set();
        });
        forced
    }
}
